"""Triton kernels on plain tensors, and what launches them; nothing here knows of autograd or of models.

Each folder has device code in `kernels` beside the host code in `launch`. `hardware` says what the device can do,
`block_sizes` has the tile shapes, `slabs` says which exponentials are stored, `trace` records what is launched.
"""
