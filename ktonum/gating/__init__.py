"""`ktonum gate`: an audit held against an earlier one, its baseline."""
