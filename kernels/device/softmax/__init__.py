"""Exponentials of a tile of logits and their sums, shared with `logits`, which launches them in float32 and wider."""
