"""Reports for people, made of results alone: `terminal` during and after an audit, `html` as one file.

`sentences` has the words for one result, `summary` and `power_tables` the tables that both show, `failure_text` one
result in a few lines, and `environment` says where results were measured. No other room makes sentences about results.
"""
