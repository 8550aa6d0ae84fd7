"""Ops that language models are made of, ready to be audited as `kto` is. One op a file, each with its ``OP``."""
