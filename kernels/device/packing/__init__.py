"""The rows of unmasked tokens are packed, so that masked tokens cost no matrix work."""
