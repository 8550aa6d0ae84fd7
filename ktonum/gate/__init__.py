"""`ktonum gate`: an audit is compared with an earlier one, its baseline, for CI that must not let errors grow."""
