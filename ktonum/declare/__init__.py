"""What an author writes down: an op, its laws, its points, its input draws and its error model.

`evaluation` runs a function once and differentiates it; `tensor_copies` makes the copies that a candidate may touch.
"""
