"""Holding the kernels' gradients to the oracle's, on every path of the backward, and counting what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.device import hardware, slabs
from ktonum.kernels.device.gradients import launch as launch_gradients
from ktonum.kernels.device.logits import launch as launch_logits
from ktonum.kernels.device.statistics import launch
from ktonum.kernels.loss import KernelOptions
from ktonum.kernels.step import sequence_gradients
from support.kto_inputs import Outcome, kernel_outcome, oracle_outcome
from support.kto_rounding import objections, spreads

#: Where a backward's exponentials come from: all out of the forward, all computed again, or some of each.
PATHS = ("stored", "recomputed", "partly stored")


def options_of(
    path: str, inputs: KTOInputs, monkeypatch: pytest.MonkeyPatch, *, columns: int = 256, validate: bool = True
) -> KernelOptions:
    """Options under which the policy's backward takes ``path``, with ``columns`` stored where some are."""
    if path == "stored":
        return KernelOptions(validate=validate)
    if path == "recomputed":
        return KernelOptions(validate=validate, workspace=1)
    monkeypatch.setattr(slabs, "_COMPUTED_AT_A_TIME", 1)
    rows = inputs.target.numel()
    return KernelOptions(
        validate=validate, workspace=rows * columns * hardware.slab_dtype(inputs.input.dtype).itemsize + 1
    )


def hold_gradients(
    inputs: KTOInputs, config: KTOConfig, upstream: Tensor | None = None, options: KernelOptions | None = None
) -> Outcome:
    """The gradients of the kernels are the oracle's within rounding, in the dtype and shape of what they belong to."""
    actual = kernel_outcome(inputs, config, upstream=upstream, options=options)
    expected = oracle_outcome(inputs, config, upstream=upstream)
    spread = spreads(inputs, config, upstream)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in actual.gradients.items():
        assert gradient.dtype == inputs.input.dtype
        assert not (found := objections(gradient, expected.gradients[name], spread[name])), (name, found)
    return actual


class Work:
    """Counts what is computed for gradients, and of how many rows.

    Attributes:
        calls: By the function's name.
        rows: Rows of slabs and of sums over them.
        stored: Slabs that forwards filled for a backward, (rows, columns).
        descriptors: Whether tiles of logits came through tensor descriptors, for each launch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: set[int] = set()
        self.stored: list[tuple[int, ...]] = []
        self.descriptors: list[bool] = []
        watched: dict[str, tuple[Any, Callable[..., Tensor | None]]] = {
            "_add_input_products": (sequence_gradients, lambda sums, e, w: e),
            "product": (launch_gradients, lambda e, x: e.t()),
            "_add_target_terms": (launch_gradients, lambda grad, first, rows: rows.input),
            "_fused_weight_gradient": (launch_gradients, lambda grad, slab, *_: slab.exponentials),
            "bias_gradient": (launch_gradients, lambda grad, slab, rows: slab.exponentials),
            "input_gradient": (launch_gradients, lambda grad, places, sums, *_: sums),
            "exponentials": (launch, lambda *_, slab: slab.exponentials),
            "row_statistics": (launch, lambda *_, slabs: slabs[0].exponentials if slabs else None),
            "block_sizes": (launch_logits, lambda *_, **__: None),
        }
        for name, (module, slab_of) in watched.items():
            monkeypatch.setattr(module, name, self.counted(name, getattr(module, name), slab_of))

    def counted(
        self, name: str, genuine: Callable[..., Any], slab_of: Callable[..., Tensor | None]
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.calls[name] += 1
            if name == "block_sizes":
                self.descriptors.append(named["descriptors"])
            if (slab := slab_of(*arguments, **named)) is not None:
                self.rows.add(slab.shape[0])
                if name == "row_statistics":
                    self.stored += [tuple(s.exponentials.shape) for s in named["slabs"]]
            return genuine(*arguments, **named)

        return call
