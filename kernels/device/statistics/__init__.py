"""Log-probabilities of rows' targets from the statistics of tiles, and exponentials on one scale."""
