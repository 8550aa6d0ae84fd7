"""Reports for people: `terminal` shows an audit while it runs and when it ends, and `html` writes it to one file.

`sentences` has the words for one result. `summary` and `power_tables` have the tables that both reports show.
`failure_text` describes one result in a few lines. `environment` says where results were measured. No other room writes
sentences about results.
"""
