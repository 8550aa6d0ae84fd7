"""`ktonum.gradcheck`: compares the gradients of any function with float64 finite differences, for tests and audits.

`gradcheck` and `gradgradcheck` read the arguments, and `one_check` makes one check of them:

- `checked_function` calls the function on copies of its inputs, nested `structures` of tensors. Each `leaf` shows a
  differentiated tensor as real numbers.
- `recorded_call` has the first call with its graph, `precisions` says what it computes in.
- `contraction` makes one number of all outputs. A `directional_derivative` of it is measured along each of the
  `directions` through the inputs.
- `differences` differentiates functions of one variable and does not know autograd. It fits with `odd_fits`.
- `verdict` decides: a `judged_probe` is the verdict on a direction, `input_verdict` that on an input. `bends` tell
  kinks and jumps from defects. `wrong_element` and `likely_cause` say what is wrong.
- `backward_passes` and `forward_mode` search for defects of derivatives that have the right numbers.
"""
