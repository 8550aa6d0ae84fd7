"""Ops that language models are made of, ready for an audit like `kto`. Each file has one op, its ``OP``.

`SHIPPED` is the registry: a new op is one file here and one line there.
"""

from __future__ import annotations

__all__ = ["SHIPPED"]

#: The ops that come with ktonum, by the name that `ktonum audit` accepts: where each is defined.
SHIPPED = {
    "kto": "ktonum.kernels.audit.kto_op:OP",
    "rms_norm": "ktonum.ready_ops.rms_norm:OP",
    "layer_norm": "ktonum.ready_ops.layer_norm:OP",
    "swiglu": "ktonum.ready_ops.swiglu:OP",
    "cross_entropy": "ktonum.ready_ops.cross_entropy:OP",
    "fused_linear_cross_entropy": "ktonum.ready_ops.fused_linear_cross_entropy:OP",
}
