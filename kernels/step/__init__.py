"""One training step of the loss: log-probabilities of sequences forward, gradients backward.

`forward_passes` runs reference, KL sequences and policy; `sequence_gradients` is the backward; `autograd` and
`operators` hand both to PyTorch, eager and under torch.compile.
"""
