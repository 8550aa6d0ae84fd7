"""Ready ops: what language models are made of, to be audited as `kto` is. One op a file, each with its ``OP``."""
