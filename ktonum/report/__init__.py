"""Reports for people: `terminal` while and after an audit runs, `html` as one file; `summary` has their words."""
