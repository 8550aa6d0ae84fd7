"""How far a result is from its oracle, for checks and tolerances, which compare the figures with bounds.

`comparison` has plain error measures. `in_roundings` measures in roundings of the output, and `against_bound` in shares
of a bound. All three go through a tensor in blocks of elements and use `accumulation`. `over_draws` measures on further
draws of the inputs. A `probe` is one tensor together with the way to measure it. Nothing here decides.
"""
