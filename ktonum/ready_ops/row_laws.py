"""Laws of ops with independent rows: the rows may be split and permuted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ktonum.declare.evaluation import Evaluation, Run
from ktonum.declare.op import Law

__all__ = ["row_laws"]


def row_laws(*rows: str, counted: Callable[[Run], int] | None = None) -> tuple[Law, ...]:
    """The laws ``row split`` and ``permutation``.

    Args:
        rows: Names of the inputs whose first dim is the rows. All rows share the other inputs and their gradients.
        counted: Returns how many rows a run's mean is taken over, or 0 if the op does not reduce its rows to a mean.
            None means that it never does. Outputs with a dim have one entry for each row. An output without a dim is a
            sum or a mean over the rows.
    """

    def selected(run: Run, index: Tensor) -> Run:
        inputs = {k: v.index_select(0, index) if k in rows else v for k, v in run.inputs.items()}
        return Run(inputs, run.parameters, {k: _selected(v, index) for k, v in run.upstream.items()})

    def index_of(run: Run) -> Tensor:
        given = run.inputs[rows[0]]
        return torch.arange(given.shape[0], device=given.device)

    def halves(run: Run) -> list[Run] | None:
        index = index_of(run)
        # Do not split in the middle, which may be a tile's edge.
        first = (2 * index.numel()) // 5
        parts = [selected(run, index[:first]), selected(run, index[first:])]
        empty = not first or (counted is not None and any(counted(part) == 0 for part in parts) and counted(run) > 0)
        return None if empty else parts

    def joined(parts: Sequence[Evaluation], run: Run) -> Evaluation:
        shares = [1.0] * len(parts)
        if counted is not None and counted(run):
            shares = [counted(half) / counted(run) for half in halves(run) or ()]

        def put_together(tensors: Sequence[Tensor | None], by_row: bool) -> Tensor | None:
            scaled = [share * t.double() for share, t in zip(shares, tensors, strict=True) if t is not None]
            if len(scaled) < len(tensors):
                return None
            return torch.cat(scaled) if by_row else torch.stack(scaled).sum(0)

        first = parts[0]
        outputs = {
            k: put_together([p.outputs[k] for p in parts], v is not None and v.dim() > 0)
            for k, v in first.outputs.items()
        }
        gradients = {
            k: put_together([p.gradients[k] for p in parts], k in rows)
            for k, v in first.gradients.items()
            # Leave out shared gradients in 16 bits. If the parts cancel, their roundings exceed the bound on their sum.
            if k in rows or (v is not None and v.element_size() > 2)
        }
        return Evaluation(outputs, gradients)

    def reversed_rows(run: Run) -> list[Run] | None:
        index = index_of(run)
        return None if index.numel() < 2 else [selected(run, index.flip(0))]

    def restored(parts: Sequence[Evaluation], run: Run) -> Evaluation:
        (part,) = parts
        outputs = {k: v.flip(0) if v is not None and v.dim() else v for k, v in part.outputs.items()}
        gradients = {k: v.flip(0) if v is not None and k in rows else v for k, v in part.gradients.items()}
        return Evaluation(outputs, gradients)

    # The whole is rounded once. The rounding error of a part, times its share, is up to two half units of the whole.
    return Law("row split", halves, joined, scale=3.0), Law("permutation", reversed_rows, restored)


def _selected(upstream: Tensor, index: Tensor) -> Tensor:
    return upstream.index_select(0, index) if upstream.dim() else upstream
