"""Measured tolerances, one TOML file an op; see `ktonum.table_files` for the schema."""
