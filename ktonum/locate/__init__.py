"""Where a failing tensor is wrong and what the error looks like, for the report of a failure.

`places` finds the place. `misplaced_values`, `lost_precision` and `wrong_constants` recognise known patterns of errors.
"""
