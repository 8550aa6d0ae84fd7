"""What a KTO loss is, in plain PyTorch: its parameters, accepted inputs, formula, interface, and the reference."""
