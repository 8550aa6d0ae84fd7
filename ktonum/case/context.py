"""One case with everything its checks need, computed once: inputs, oracle, plain run, candidate run, bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ktonum.bounds import Arithmetic, ErrorBound, from_measured_error, unit_roundoff
from ktonum.case.candidate_errors import candidate_errors
from ktonum.declare.cases import Case, torch_dtype
from ktonum.declare.drawing import Draw
from ktonum.declare.error_model import DerivedErrors
from ktonum.declare.evaluation import Evaluation, Run, evaluate, named_outputs, upcast
from ktonum.declare.op import Op
from ktonum.declare.tensor_copies import private_copy
from ktonum.errors import CandidateError
from ktonum.measure.comparison import compare
from ktonum.measure.over_draws import drawn_errors, typical_errors

__all__ = ["MEASURED_SCALE", "CaseContext"]

#: Plain runs stand in for an analysis: their error, times this, is granted. Two correct implementations differ
#: by their order of summation, and a root mean square says nothing of the largest of many elements.
MEASURED_SCALE = 4.0
# `eager` stores intermediates in 16 bits, and where they saturate, as a sigmoid does, their roundings are no matter of
# chance: twice the bias of plain PyTorch is granted, as FlashAttention's tests grant twice its error. What another
# implementation stores may have another bias; an op's error model adds it where it is known.
_PLAIN_BIAS_SCALE = 2.0
# Fewer elements than this do not tell how large an error typically is; as many further draws of the inputs do.
_ENOUGH_TO_AVERAGE = 64
_OTHER_DRAWS = 16


class CaseContext:
    """The lazily computed state of one case. Checks read it and never change it.

    Attributes:
        op: The op under audit.
        case: The point, dtype and device.
        device: The very device, e.g. ``cuda:1``.
    """

    def __init__(self, op: Op, case: Case, device: torch.device | None = None) -> None:
        self.op = op
        self.case = case
        self.device = torch.device(case.device) if device is None else device
        self._bounds: dict[str, dict[str, ErrorBound]] = {}

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

    def varied(
        self, *, inputs: Mapping[str, Any] | None = None, upstream: Mapping[str, Tensor] | None = None
    ) -> CaseContext:
        """The same case with other inputs or upstream gradients, and an oracle, runs and bounds of its own."""
        other = CaseContext(self.op, self.case, self.device)
        other.inputs = self.inputs if inputs is None else dict(inputs)
        other.upstream = self.upstream if upstream is None else dict(upstream)
        return other

    def resized(self, dims: Mapping[str, int]) -> CaseContext:
        """The same case at other sizes, and so with other inputs."""
        point = replace(self.case.point, dims={**self.case.point.dims, **dims})
        return CaseContext(self.op, replace(self.case, point=point), self.device)

    def redrawn(self, index: int) -> CaseContext:
        """The same case with other inputs from the same distribution, one set for each index."""
        return self.varied(inputs=self.op.sample(Draw.of(self.case, self.device, purpose=f"draw {index}")))

    @property
    def run(self) -> Run:
        """The case's own run."""
        return Run(self.inputs, self.parameters, self.upstream)

    def reference(self, **inputs: Any) -> Any:
        """The reference as a function of the inputs alone, parameters filled in."""
        return self.op.reference(**inputs, **self.parameters)

    @cached_property
    def oracle(self) -> Evaluation:
        """The reference in float64 on the very values the candidate sees."""
        inputs = upcast(self.inputs, torch.float64)
        return evaluate(self.reference, inputs, differentiable=self.differentiable, upstream=self.upstream)

    @cached_property
    def plain(self) -> Evaluation:
        """The reference in the dtype under audit: what plain PyTorch makes of this case."""
        return evaluate(self.reference, self.inputs, differentiable=self.differentiable, upstream=self.upstream)

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
        inputs, upstream = self.lent(run.inputs), self.lent(run.upstream)
        with candidate_errors():
            return evaluate(candidate, inputs, differentiable=names, upstream=upstream)

    def evaluate_reference(self, *, differentiable: Sequence[str]) -> Evaluation:
        """Outputs of the reference in float64, where only the named inputs require a gradient; no gradients."""
        return evaluate(self.reference, upcast(self.inputs, torch.float64), differentiable=differentiable)

    def lent(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of the case's tensors and of views of them, with the same strides; anything else as it is.

        A candidate that writes to its inputs would change the results of the case's other runs, and one that writes the
        same again would find its own traces there and leave none.
        """
        return {name: self._lent(value) for name, value in values.items()}

    def _lent(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        own = [t for t in (*self.inputs.values(), *self.upstream.values()) if isinstance(t, Tensor)]
        memory = value.untyped_storage().data_ptr()
        return private_copy(value) if any(t.untyped_storage().data_ptr() == memory for t in own) else value

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
                    f"gave no gradient for {name!r}, and the reference's is not zero: autograd lost it"
                )
        for name, output in self.oracle.outputs.items():
            if name not in result.outputs:
                raise CandidateError(f"returned no {name!r}: it returned {', '.join(result.outputs)}")
            mine = result.outputs[name]
            if mine is not None and output is not None and mine.shape != output.shape:
                raise CandidateError(
                    f"{name!r} has shape {tuple(mine.shape)}: the reference's is {tuple(output.shape)}"
                )
        actual = result.tensors()
        return {name: tensor for name, tensor in expected.items() if name in actual}

    def bounds(self, standard: str) -> dict[str, ErrorBound]:
        """Bounds by tensor name, gradients as ``grad_NAME``, under ``standard``."""
        if standard not in self._bounds:
            self._bounds[standard] = self._derive(standard)
        return self._bounds[standard]

    def _derive(self, standard: str) -> dict[str, ErrorBound]:
        arithmetic = Arithmetic.of(standard, self.dtype, self.case.device)
        derived: Mapping[str, DerivedErrors] = {}
        if self.op.error_model is not None:
            derived = self.op.error_model(self.inputs, self.parameters, self.upstream, self.oracle, arithmetic)
        finals = {name: t.dtype for name, t in self.plain.tensors().items()}
        bounds = {}
        for name, expected in self.oracle.tensors().items():
            final = finals.get(name, self.dtype)
            if name in derived:
                independent, coherent, *known = derived[name]
                source = f"rounding-error analysis, {standard}"
                bounds[name] = ErrorBound(independent, coherent, final, source, *known)
            else:
                bounds[name] = self._measured(name, expected, final, standard, arithmetic)
            if standard == "eager" and self.dtype in (torch.bfloat16, torch.float16):
                bias = abs(bounds[name].bias) + _PLAIN_BIAS_SCALE * abs(self._plain_bias(name, expected))
                bounds[name] = replace(bounds[name], bias=bias)
        return bounds

    def _plain_bias(self, name: str, expected: Tensor) -> float:
        """The signed bias of plain PyTorch's tensor; 0 where it lacks the tensor or is not finite."""
        plain = self.plain.tensors().get(name)
        bias = 0.0 if plain is None else compare(actual=plain, expected=expected).signed_bias
        return bias if math.isfinite(bias) else 0.0

    def _measured(
        self, name: str, expected: Tensor, final: torch.dtype, standard: str, arithmetic: Arithmetic
    ) -> ErrorBound:
        if standard == "eager" and self.dtype != torch.float64:  # there the plain run is the oracle, without error
            stand_in, scale, words = self.plain, MEASURED_SCALE, f"the reference in {self.case.dtype}"
        else:
            # Inputs are drawn in float32, so that a float32 run sees the values of any case exactly; its error scales
            # with the unit roundoff.
            stand_in = self._single
            scale = MEASURED_SCALE * unit_roundoff(arithmetic.accumulator) / unit_roundoff(torch.float32)
            words = "the reference in float32"
        actual = stand_in.tensors().get(name)
        if actual is None:
            actual = torch.full_like(expected, math.nan)
        typical = 0.0
        if expected.numel() < _ENOUGH_TO_AVERAGE:
            elsewhere = self._plain_errors if stand_in is self.plain else self._single_errors
            typical = elsewhere.get(name, 0.0)
        independent, coherent = from_measured_error(actual=actual, expected=expected, scale=scale, typical=typical)
        return ErrorBound(independent, coherent, final, f"{MEASURED_SCALE:g} × the error of {words}")

    @cached_property
    def _plain_errors(self) -> dict[str, float]:
        return self.typical_errors(self.reference, self.dtype)

    @cached_property
    def _single_errors(self) -> dict[str, float]:
        return self.typical_errors(self.reference, torch.float32)

    def further_runs(self, count: int) -> Iterator[Run]:
        """The case's run on ``count`` further draws of the inputs, the same each time; one is in memory at a time."""
        return (self.redrawn(i).run for i in range(count))

    def typical_errors(self, stand_in: Callable[..., Any], dtype: torch.dtype) -> dict[str, float]:
        """Relative errors of ``stand_in`` in ``dtype`` by tensor over further draws, see `measure.over_draws`."""
        runs = self.further_runs(_OTHER_DRAWS)
        errors = drawn_errors(stand_in, dtype, reference=self.reference, runs=runs, differentiable=self.differentiable)
        return typical_errors(errors, here=self.oracle.tensors(), cancelling=self.op.cancelling)

    @cached_property
    def _single(self) -> Evaluation:
        inputs = upcast(self.inputs, torch.float32)
        return evaluate(self.reference, inputs, differentiable=self.differentiable, upstream=self.upstream)
