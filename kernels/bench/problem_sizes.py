"""What `ktonum bench` measures: problem sizes, and inputs of realistic scale for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ktonum.errors import UsageError
from ktonum.kernels.contract.inputs import KTOInputs

__all__ = ["CASES", "GOALS", "BenchmarkCase", "Goal", "chosen_cases", "draw_inputs"]


@dataclass(frozen=True)
class BenchmarkCase:
    """One problem. A reference model is always given.

    Attributes:
        name: What the table calls it.
        group: ``goals``, ``dtypes``, ``small``, ``tokens`` (growth over tokens) or ``vocabulary`` (growth over V).
        B, T, H, V: Sequences, tokens each, hidden size, vocabulary.
        dtype: Of hidden states and heads.
        masked: The share of each sequence that is prompt; it comes first.
        kl_sequences: Whether the KL reference point comes from KL sequences of the same shape.
        errors: Whether to compare results with a float64 oracle, which takes seconds.
        contenders: Which to run; empty for all.
    """

    name: str
    group: str
    B: int
    T: int
    H: int = 4096
    V: int = 151_936
    dtype: torch.dtype = torch.bfloat16
    masked: float = 0.0
    kl_sequences: bool = False
    errors: bool = False
    contenders: tuple[str, ...] = ()

    @property
    def dims(self) -> dict[str, int]:
        """B, T, H and V by letter."""
        return {"B": self.B, "T": self.T, "H": self.H, "V": self.V}


# All contenders, and CUDA graphs, which show what a small step takes without the host.
_SMALL = (
    "ktonum",
    "ktonum, lean",
    "plain PyTorch",
    "torch.compile",
    "Liger-Kernel",
    "TRL",
    "cut-cross-entropy",
    "ktonum, CUDA graph",
    "plain PyTorch, CUDA graph",
)
# These cases show how our own time and memory grow. With one peer they stay short.
_GROWING = ("ktonum", "ktonum, lean", "TRL")

CASES = (
    BenchmarkCase("8 x 1024", "goals", 8, 1024, errors=True),
    BenchmarkCase("half masked", "goals", 8, 1024, masked=0.5),
    BenchmarkCase("2 x 8192", "goals", 2, 8192, errors=True),
    BenchmarkCase("KL sequences", "goals", 8, 1024, kl_sequences=True),
    BenchmarkCase("fp16", "dtypes", 8, 1024, dtype=torch.float16, errors=True),
    BenchmarkCase("fp32", "dtypes", 4, 512, H=2048, V=32_000, dtype=torch.float32, errors=True),
    BenchmarkCase("small", "small", 2, 128, H=1024, V=32_000, errors=True, contenders=_SMALL),
    *(BenchmarkCase(f"{T} tokens", "tokens", 1, T, contenders=_GROWING) for T in (512, 2048, 8192, 32_768, 65_536)),
    *(
        BenchmarkCase(f"V = {V}", "vocabulary", 8, 1024, V=V, contenders=_GROWING)
        for V in (32_768, 65_536, 131_072, 262_144)
    ),
)


@dataclass(frozen=True)
class Goal:
    """What a contender of ours shall reach on an H100; None if there is no goal.

    Attributes:
        case, contender: By name.
        ratio: Time over the limit's, at most.
        gibibytes: Peak extra memory, at most.
        loss, gradient, bias: Errors, at most; see `ktonum.kernels.bench.timing.Errors`.
        against_peers: Time over the fastest peer's, at most. A CUDA graph is compared with CUDA graphs.
    """

    case: str
    contender: str
    ratio: float | None = None
    gibibytes: float | None = None
    loss: float | None = None
    gradient: float | None = None
    bias: float | None = None
    against_peers: float | None = None


GOALS = (
    Goal("8 x 1024", "ktonum", ratio=1.06, gibibytes=3.8, loss=3e-7, gradient=1.9e-3),
    Goal("8 x 1024", "ktonum, lean", ratio=1.30, gibibytes=1.35, loss=3e-7, gradient=1.9e-3),
    Goal("half masked", "ktonum", ratio=1.10),
    Goal("half masked", "ktonum, lean", ratio=1.35),
    Goal("2 x 8192", "ktonum", ratio=1.06, gradient=1.9e-3, bias=2e-5),
    Goal("2 x 8192", "ktonum, lean", ratio=1.30, gradient=1.9e-3, bias=2e-5),
    Goal("KL sequences", "ktonum", ratio=1.08),
    Goal("fp16", "ktonum", ratio=1.06),
    Goal("fp32", "ktonum", against_peers=1.0),
    Goal("small", "ktonum", against_peers=1.0),
    Goal("small", "ktonum, CUDA graph", against_peers=1.0),
)


def chosen_cases(names: tuple[str, ...]) -> tuple[BenchmarkCase, ...]:
    """The cases with these names or groups; all cases if there are no names.

    Raises:
        UsageError: A name is neither a case nor a group.
    """
    known = {case.name for case in CASES} | {case.group for case in CASES}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"unknown case {unknown[0]!r}: use {', '.join(sorted(known))}")
    return tuple(case for case in CASES if not names or case.name in names or case.group in names)


def draw_inputs(case: BenchmarkCase, device: torch.device) -> KTOInputs:
    """Logits of standard deviation 1.5 and a reference model near the policy, from a seed of the case's name.

    They are drawn piece by piece in the case's dtype, because a float32 copy of the head would add to the case's
    memory.
    """
    generator = torch.Generator(device).manual_seed(sum((i + 1) * ord(c) for i, c in enumerate(case.name)))

    def normal(rows: int, columns: int, scale: float, near: Tensor | None = None) -> Tensor:
        out = torch.empty(rows, columns, dtype=case.dtype, device=device)
        for start in range(0, rows, 8192):
            part = out[start : start + 8192]
            noise = scale * torch.randn(part.shape, generator=generator, device=device)
            part.copy_(noise if near is None else near[start : start + 8192].float() + noise)
        return out

    def hidden(near: Tensor | None = None) -> Tensor:
        flat = None if near is None else near.view(-1, case.H)
        return normal(case.B * case.T, case.H, 1.0 if near is None else 0.1, flat).view(case.B, case.T, case.H)

    def targets() -> Tensor:
        target = torch.randint(0, case.V, (case.B, case.T), generator=generator, device=device)
        target[:, : int(case.masked * case.T)] = -100
        return target

    input, weight = hidden(), normal(case.V, case.H, 1.5 * case.H**-0.5)
    inputs = {
        "input": input,
        "weight": weight,
        "target": targets(),
        "preference_labels": torch.arange(case.B, device=device) % 2 == 0,
        "ref_input": hidden(input),
        "ref_weight": normal(case.V, case.H, 0.1 * case.H**-0.5, weight),
    }
    if case.kl_sequences:
        kl_input = hidden()
        inputs |= {"kl_input": kl_input, "kl_target": targets(), "kl_ref_input": hidden(kl_input)}
    for name in ("input", "weight"):
        inputs[name].requires_grad_()
    return KTOInputs(**inputs)
