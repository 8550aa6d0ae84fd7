"""The exception of a failed gradient check. Apart from `ktonum.errors`, which does not import torch."""

from __future__ import annotations

from torch.autograd.gradcheck import GradcheckError as TorchGradcheckError

from ktonum.errors import KtonumError

__all__ = ["GradcheckError"]


class GradcheckError(KtonumError, TorchGradcheckError):
    """A gradient disagrees with finite differences, or the check cannot tell.

    It is a subclass of torch's exception of the same name, and so a ``RuntimeError``. Existing ``except`` clauses keep
    working.

    Attributes:
        result: The `GradcheckResult`.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result
