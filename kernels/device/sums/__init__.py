"""Sums over columns and tokens, and the rows' coefficients: what is small beside the matrix products."""
