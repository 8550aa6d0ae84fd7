"""`ktonum bench`: time, memory and error of KTO losses, beside the matrix products that each of them needs.

Each contender takes turns with these products, the limit. Its figure is the median over rounds of its time divided by
that of the limit just before. A GPU's clock depends on power and temperature: on an H100 the same product took 12.8 ms
at first and 13.4 ms a minute later. In rounds through all contenders a figure depended on who ran before: 1.20 among
eight, 1.07 among two.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ktonum.kernels.bench.contenders import LIMIT, Contender, Loss, contenders, limit
from ktonum.kernels.bench.problem_sizes import BenchmarkCase, draw_inputs
from ktonum.kernels.contract.config import KTOConfig
from ktonum.kernels.contract.inputs import KTOInputs
from ktonum.kernels.contract.reference import reference_kto_loss

__all__ = ["Errors", "Measured", "errors_against", "float64_oracle", "measure_case", "milliseconds", "timed"]

_DIFFERENTIABLE = ("input", "weight")


@dataclass(frozen=True)
class Errors:
    """Errors against the float64 oracle on the same values.

    Attributes:
        loss: |error| / |loss|.
        gradient: ‖error‖ / ‖gradient‖, the larger of hidden states' and head's.
        bias: ⟨error, gradient⟩ / ⟨gradient, gradient⟩, the larger in magnitude.
    """

    loss: float
    gradient: float
    bias: float


@dataclass(frozen=True)
class Measured:
    """One contender on one case.

    Attributes:
        contender: Its name, `LIMIT` for the bare products.
        milliseconds: Forward and backward, median over rounds; None if it did not run.
        ratio: Median over rounds of its time over the limit's.
        spread: Largest less smallest ratio over rounds.
        peak_bytes: Peak allocated memory beyond the inputs, gradients included; None for the limit.
        errors: None if the case measures none.
        problem: Why it did not run; empty if it did.
    """

    contender: str
    milliseconds: float | None = None
    ratio: float | None = None
    spread: float | None = None
    peak_bytes: int | None = None
    errors: Errors | None = None
    problem: str = ""


def measure_case(
    case: BenchmarkCase, *, device: torch.device, rounds: int, names: Sequence[str] = ()
) -> tuple[Measured, ...]:
    """The limit and every contender that is installed, or those of ``names``, on one case.

    A contender that fails (out of memory, an exception of its own) is reported with its reason; the others go on.
    """
    inputs = draw_inputs(case, device)
    with torch.cuda.device(device):
        oracle = float64_oracle(inputs) if case.errors else None
        runs: dict[str, Callable[[], None]] = {LIMIT: limit(inputs)}
        found: dict[str, Measured] = {LIMIT: Measured(LIMIT)}
        for contender in contenders():
            taking_part = contender.name in case.contenders or not (case.contenders or contender.captured)
            if not taking_part or contender.name not in (names or (contender.name,)):
                continue
            found[contender.name] = _first_run(contender, case, inputs, oracle)
            if not found[contender.name].problem:
                make = _captured_step if contender.captured else _step
                runs[contender.name] = make(contender.make(), inputs)
        del oracle
        return timed(found, runs, rounds)


def _first_run(
    contender: Contender, case: BenchmarkCase, inputs: KTOInputs, oracle: dict[str, Tensor] | None
) -> Measured:
    """The contender's memory and errors. Afterwards everything is compiled."""
    measured = Measured(contender.name)
    if contender.version is None:
        return replace(measured, problem=f"{contender.package} is not installed")
    if case.kl_sequences and not contender.kl_sequences:
        return replace(measured, problem="takes no KL sequences")
    try:
        loss = contender.make()
        step = _step(loss, inputs)
        step()
        _free_gradients(inputs)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        measured = replace(measured, peak_bytes=torch.cuda.max_memory_allocated() - before)
        _free_gradients(inputs)
        if oracle is not None:
            measured = replace(measured, errors=errors_against(oracle, loss, inputs))
    except Exception as error:  # An error of a published loss is a line of the table; the others go on.
        measured = replace(measured, problem=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
    _free_gradients(inputs)
    return measured


def _free_gradients(inputs: KTOInputs) -> None:
    for name in _DIFFERENTIABLE:
        getattr(inputs, name).grad = None
    gc.collect()
    torch.cuda.empty_cache()


def _step(loss: Loss, inputs: KTOInputs) -> Callable[[], None]:
    """Forward and backward, as a training step does them."""

    def step() -> None:
        for name in _DIFFERENTIABLE:
            getattr(inputs, name).grad = None
        loss(inputs).backward()  # type: ignore[no-untyped-call]

    return step


def _captured_step(loss: Loss, inputs: KTOInputs) -> Callable[[], None]:
    """The same as a CUDA graph, which costs the host one launch. All replays write gradients to the same memory."""
    step = _step(loss, inputs)
    # Whatever a first run sets up must happen on another stream than the one that is captured, see
    # https://docs.pytorch.org/docs/stable/notes/cuda.html#whole-network-capture
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def milliseconds(run: Callable[[], None]) -> float:
    """The time that the current CUDA device takes for what ``run`` launches."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def timed(
    found: Mapping[str, Measured],
    runs: Mapping[str, Callable[[], None]],
    rounds: int,
    *,
    clock: Callable[[Callable[[], None]], float] = milliseconds,
) -> tuple[Measured, ...]:
    """Each contender in turns with the limit.

    Args:
        found: What is known of each contender so far, by name; `LIMIT` among them.
        runs: A step of each that can run, by name; `LIMIT` among them.
        rounds: How many turns count.
        clock: The milliseconds of one run.
    """
    limits: list[float] = []
    done: dict[str, Measured] = {}
    for name, run in runs.items():
        if name == LIMIT:
            continue
        pairs: list[tuple[float, float]] = []
        # The first pair is not counted: it brings the device into the state in which this contender leaves it.
        for turn in range(rounds + 1):
            try:
                pair = clock(runs[LIMIT]), clock(run)
            except torch.cuda.OutOfMemoryError:
                torch.cuda.empty_cache()
                done[name] = replace(found[name], problem="out of memory beside the limit's own buffer")
                break
            if turn:
                pairs.append(pair)
        else:
            limits += [base for base, _ in pairs]
            ratios = [own / base for base, own in pairs]
            done[name] = replace(
                found[name],
                milliseconds=statistics.median(own for _, own in pairs),
                ratio=statistics.median(ratios),
                spread=max(ratios) - min(ratios),
            )
    if not limits:
        limits = [clock(runs[LIMIT]) for _ in range(rounds + 1)][1:]
    done[LIMIT] = Measured(LIMIT, statistics.median(limits), 1.0, 0.0)
    return tuple(done.get(name, measured) for name, measured in found.items())


def float64_oracle(inputs: KTOInputs) -> dict[str, Tensor]:
    """Loss and gradients in float64, on the very values that the contenders get."""
    tensors = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs.tensors().items()}
    for name in _DIFFERENTIABLE:
        tensors[name].requires_grad_()
    loss, _ = reference_kto_loss(KTOInputs(**tensors), KTOConfig())
    gradients = torch.autograd.grad(loss, [tensors[name] for name in _DIFFERENTIABLE])
    return {"loss": loss.detach(), **dict(zip(_DIFFERENTIABLE, gradients, strict=True))}


def errors_against(oracle: dict[str, Tensor], loss: Loss, inputs: KTOInputs) -> Errors:
    """The errors of a loss' value and gradients against ``oracle``, the result of `float64_oracle` on the inputs."""
    value = loss(inputs)
    gradients = torch.autograd.grad(value, [getattr(inputs, name) for name in _DIFFERENTIABLE])
    norms, biases = [], []
    for name, gradient in zip(_DIFFERENTIABLE, gradients, strict=True):
        squares = error_squares = projection = 0.0
        # In stretches, because two copies of the head's gradient in float64 would take 10 GB more.
        flat, exact = gradient.flatten(0, -2), oracle[name].flatten(0, -2)
        for first in range(0, len(flat), 8192):
            expected = exact[first : first + 8192]
            error = flat[first : first + 8192].double() - expected
            squares += float(expected.square().sum())
            error_squares += float(error.square().sum())
            projection += float((error * expected).sum())
        norms.append((error_squares / squares) ** 0.5)
        biases.append(projection / squares)
    off = abs(float(value.detach().double() - oracle["loss"]) / float(oracle["loss"]))
    return Errors(off, max(norms), max(biases, key=abs))
