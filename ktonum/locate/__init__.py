"""Where a failing tensor is wrong and what the error looks like, for the report of a failure.

`places` finds the place; the signatures are known patterns: `misplaced_values`, `lost_precision`, `wrong_constants`.
"""
