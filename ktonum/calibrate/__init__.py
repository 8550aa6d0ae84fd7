"""`ktonum calibrate`: measures errors of right implementations and makes the rows of tolerance tables of them.

Blocks of seeds are measured and kept in a file of samples; tails are fitted; rows tighten, or loosen for a reason.
"""
