"""Power: small defects are planted in a tensor that passed, to say which of them its check would have missed.

`defect_kinds` lists the defects, `planting` plants them and measures again.
"""
