"""Ops that language models are made of, ready for an audit like `kto`. Each file has one op, its ``OP``."""
