"""Power: plants small defects in a tensor that passed, to find out which of them its check would have missed.

`defect_kinds` lists the defects. `planting` plants them and measures again.
"""
