"""`ktonum gate` compares an audit with an earlier one, its baseline, so that CI fails if errors grow."""
