"""A failing case made small, and a script that shows the failure there and nothing else."""
