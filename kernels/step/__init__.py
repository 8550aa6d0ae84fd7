"""One training step of the loss: the forward computes log-probabilities of sequences, the backward their gradients.

`forward_passes` runs the reference model, the KL sequences and the policy. `sequence_gradients` is the backward.
`autograd` makes differentiable functions of both, and `operators` does so for torch.compile, with `flattening`.
"""
