"""Triton kernels on plain tensors, and the functions that launch them. Nothing here knows of autograd or of models.

In each folder `kernels` is device code, and `launch` is the host code that launches it. `hardware` says what the device
can do, `block_sizes` has the tile shapes, `slabs` says which exponentials are stored, `trace` records what is launched.
"""
