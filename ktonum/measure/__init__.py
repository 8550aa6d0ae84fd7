"""How far a result is from its oracle. For checks and tolerances, which hold the figures against bounds.

`comparison` has plain error measures, `in_roundings` counts errors in roundings of the output, `against_bound` in
shares of a bound; all three accumulate over blocks of elements, with `accumulation`. `over_draws` measures on further
draws of the inputs. A `probe` is one tensor with the way to measure it. Nothing here decides.
"""
