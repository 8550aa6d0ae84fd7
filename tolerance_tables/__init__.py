"""Measured tolerances, one TOML file an op; see `ktonum.tolerances.table_files` for the schema."""
