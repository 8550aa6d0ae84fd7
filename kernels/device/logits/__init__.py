"""Tiles of logits, of which only softmax statistics and, if the caller wants them, exponentials are stored."""
