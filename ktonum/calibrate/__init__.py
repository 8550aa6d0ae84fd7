"""`ktonum calibrate`: measures errors of right implementations, from which it makes the rows of tolerance tables.

It measures blocks of seeds and keeps their errors in a file of samples. Tails are fitted to these errors. New rows may
have tighter tolerances than the old ones, or looser ones with a reason.
"""
