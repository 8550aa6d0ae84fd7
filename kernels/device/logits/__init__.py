"""Tiles of logits, of which only softmax statistics and, where asked for, exponentials are stored."""
