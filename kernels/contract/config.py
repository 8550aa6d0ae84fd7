"""The parameters of a KTO loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ktonum.errors import InputError

__all__ = ["KTOConfig", "LossType", "Reduction"]

LossType = Literal["kto", "apo_zero_unpaired"]


Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True, kw_only=True)
class KTOConfig:
    """The parameters of a KTO loss, apart from tensors.

    Attributes:
        loss_type: ``kto`` or ``apo_zero_unpaired``; the latter uses no KL reference point.
        beta: Temperature of the implied reward; finite.
        desirable_weight: λ_D, multiplies the losses of desirable (label true) sequences.
        undesirable_weight: λ_U, multiplies the losses of undesirable sequences.
        ignore_index: Target value of the tokens that are not part of the completion.
        average_log_prob: Divide a sequence's log-probability by its number of unmasked tokens.
        reduction: ``mean`` (over sequences), ``sum``, or ``none`` for losses of shape (B,).

    Raises:
        InputError: A value is not accepted; the message says which are.
    """

    loss_type: LossType = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    ignore_index: int = -100
    average_log_prob: bool = False
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        for name, accepted in (("loss_type", get_args(LossType)), ("reduction", get_args(Reduction))):
            if getattr(self, name) not in accepted:
                raise InputError(f"{name} = {getattr(self, name)!r}: use one of {', '.join(map(repr, accepted))}")
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"{name} = {value!r}: use a finite number")
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise InputError(f"ignore_index = {self.ignore_index!r}: use an integer, such as -100")
