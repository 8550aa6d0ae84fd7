"""One case and its runs: inputs, oracle, plain PyTorch and the candidate, each computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ktonum.case.candidate_errors import candidate_errors
from ktonum.case.lending import lent
from ktonum.declare.cases import Case, torch_dtype
from ktonum.declare.drawing import Draw
from ktonum.declare.evaluation import Evaluation, Run, evaluate, named_outputs, upcast
from ktonum.declare.op import Op
from ktonum.errors import CandidateError

__all__ = ["CaseRuns"]


class CaseRuns:
    """A case's inputs and runs. They are computed when they are first asked for, and then kept.

    Attributes:
        op: The op under audit.
        case: The point, dtype and device.
        device: The device with its number, e.g. ``cuda:1``.
    """

    def __init__(self, op: Op, case: Case, device: torch.device | None = None) -> None:
        self.op = op
        self.case = case
        self.device = torch.device(case.device) if device is None else device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype under audit."""
        return torch_dtype(self.case.dtype)

    @property
    def parameters(self) -> Mapping[str, Any]:
        """The point's parameters."""
        return self.case.point.parameters

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The inputs by name, drawn from the case's seed."""
        return self.op.sample(Draw.of(self.case, self.device))

    @cached_property
    def differentiable(self) -> tuple[str, ...]:
        """Inputs that get gradients: those the op names, as far as this case has them, or every floating tensor."""
        names = self.op.differentiable or tuple(
            k for k, v in self.inputs.items() if isinstance(v, Tensor) and v.is_floating_point()
        )
        return tuple(n for n in names if isinstance(self.inputs.get(n), Tensor))

    @cached_property
    def upstream(self) -> dict[str, Tensor]:
        """Signed upstream gradients for the outputs that the reference differentiates; never one.

        An upstream gradient of one hides a backward that ignores it.
        """
        draw = Draw.of(self.case, self.device, purpose="upstream")
        leaves = upcast(self.inputs, torch.float64)
        for name in self.differentiable:
            leaves[name] = leaves[name].detach().requires_grad_()
        upstream = {}
        for name, output in named_outputs(self.reference(**leaves)).items():
            if output is not None and output.requires_grad:
                # Eighths: scaled by a factor of few bits they are still exact in any dtype.
                size = draw.integers(*output.shape, low=4, high=16).double() / 8
                upstream[name] = torch.where(draw.booleans(*output.shape), size, -size).to(self.dtype)
        return upstream

    @property
    def run(self) -> Run:
        """The case's own run."""
        return Run(self.inputs, self.parameters, self.upstream)

    def reference(self, **inputs: Any) -> Any:
        """The reference as a function of the inputs alone, parameters filled in."""
        return self.op.reference(**inputs, **self.parameters)

    @cached_property
    def oracle(self) -> Evaluation:
        """The reference in float64, on the same values that the candidate gets."""
        return self._of_reference(upcast(self.inputs, torch.float64))

    @cached_property
    def plain(self) -> Evaluation:
        """The reference in the dtype under audit: plain PyTorch's result on this case."""
        return self._of_reference(self.inputs)

    @cached_property
    def single(self) -> Evaluation:
        """The reference in float32."""
        return self._of_reference(upcast(self.inputs, torch.float32))

    def _of_reference(self, inputs: Mapping[str, Any]) -> Evaluation:
        return evaluate(self.reference, inputs, differentiable=self.differentiable, upstream=self.upstream)

    def evaluate_reference(self, *, differentiable: Sequence[str]) -> Evaluation:
        """Outputs of the reference in float64, where only the named inputs require a gradient; no gradients."""
        return evaluate(self.reference, upcast(self.inputs, torch.float64), differentiable=differentiable)

    @cached_property
    def candidate(self) -> Callable[..., Any]:
        """The candidate as a function of the inputs; `ktonum.errors.UsageError` where it lacks what the case needs."""
        return self.op.bound_candidate(self.parameters)

    def evaluate(self, run: Run | None = None, *, differentiable: Sequence[str] | None = None) -> Evaluation:
        """Run the candidate.

        Args:
            run: What to run it on; the case's own run by default.
            differentiable: Inputs that require a gradient; the case's `differentiable` by default.

        Raises:
            CandidateError: It raised, with its traceback; or its result's structure is not the reference's.
            UsageError: Its kernels ran in Triton's interpreter and calculated in bfloat16, which comes out wrong there.
        """
        run = self.run if run is None else run
        candidate, names = self.candidate, self.differentiable if differentiable is None else differentiable
        inputs, upstream = lent(run.inputs, owner=self.run), lent(run.upstream, owner=self.run)
        with candidate_errors():
            return evaluate(candidate, inputs, differentiable=names, upstream=upstream)

    @cached_property
    def result(self) -> Evaluation:
        """The candidate's run on the case as it is."""
        return self.evaluate()

    def expected(self) -> dict[str, Tensor]:
        """The oracle's outputs and gradients by name, as far as the candidate has the outputs.

        Raises:
            CandidateError: The candidate lacks an output or a gradient that the reference has.
        """
        result = self.result
        expected = self.oracle.tensors()
        for name, gradient in self.oracle.gradients.items():
            if gradient is not None and result.gradients.get(name) is None:
                raise CandidateError(
                    f"gave no gradient for {name!r}, but the reference gives one: do not detach {name!r}, and do not "
                    f"return None for it in backward"
                )
        for name, output in self.oracle.outputs.items():
            if name not in result.outputs:
                raise CandidateError(f"returned no {name!r}: it returned {', '.join(result.outputs)}")
            mine = result.outputs[name]
            if mine is not None and output is not None and mine.shape != output.shape:
                raise CandidateError(
                    f"returned {name!r} with shape {tuple(mine.shape)}: return the reference's shape "
                    f"{tuple(output.shape)}"
                )
        actual = result.tensors()
        return {name: tensor for name, tensor in expected.items() if name in actual}
