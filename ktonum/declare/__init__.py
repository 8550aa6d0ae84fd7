"""The declarations of an op's author: the op, its laws, its points, its input draws and its error model.

`evaluation` runs a function once and differentiates it. `tensor_copies` makes copies that a candidate may change.
"""
