"""Which tokens take part: their rows are packed, so that masked ones cost no matrix work."""
