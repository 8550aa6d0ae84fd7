"""Calibration: errors of right implementations, their tails, and the tolerances that a table keeps."""
