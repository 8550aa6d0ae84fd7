"""Reports for people, made of results alone: `terminal` during and after an audit, `html` as one file.

`summary` and `power_tables` have the words and tables that both show, `environment` says where results were measured.
"""
