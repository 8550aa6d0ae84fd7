"""`ktonum.assert_within`, for tests: compares a result with a tolerance from a measured table or from a derivation.

`tables` has the rows and their look-up. `table_files` reads and writes them. `failure_message` says what is wrong.
"""
