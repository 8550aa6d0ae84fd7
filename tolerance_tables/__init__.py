"""Measured tolerances, one TOML file an op; see `ktonum.tables` for the schema."""
