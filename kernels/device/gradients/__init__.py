"""Gradients of inputs, weight and bias from a slab of exponentials."""
