"""KTO losses with one planted defect each. Every one is a small edit of the right loss in `plain_kto`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ktonum.declare.cases import Point
from ktonum.kernels.contract.formula import kto_losses
from ktonum.kernels.contract.inputs import KTOInputs
from subjects.plain_kto import PlainKTO, Result
from subjects.planted import (
    Change,
    Defect,
    DriftingUlp,
    SummedInLowPrecision,
    as_if_contiguous,
    last_row_zero,
    last_tile_missing,
    reading_past_the_end,
    rounded,
    tile_unwritten,
    times,
    truncated_to_bf16,
    with_gradient,
)

MODEL = Point({"B": 4, "T": 7, "H": 16, "V": 24}, {"with_bias": True, "masked": 0.6})
KL = Point(
    {"B": 4, "T": 5, "H": 12, "V": 19},
    {"kl_from": "sequences", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7, "masked": 0.9},
    without=("gradcheck",),  # differences see the influence of the reference point; its gradient is detached
)
AVERAGE = Point(
    {"B": 3, "T": 7, "H": 17, "V": 19},
    {"kl_from": "scalar", "average_log_prob": True, "ignore_index": 5, "beta": 0.7, "masked": 0.6},
)
APO = Point(
    {"B": 3, "T": 5, "H": 17, "V": 29},
    {"loss_type": "apo_zero_unpaired", "reduction": "sum", "reference_from": "logps", "masked": 0.9},
)
NONE = Point(
    {"B": 5, "T": 6, "H": 8, "V": 37},
    {"reduction": "none", "kl_from": "batch", "reference_from": "none", "beta": 0.05, "masked": 0.5},
)
# Without a reference, log-probabilities are negative. References that count masked tokens, too, are below the policy's.
KL_NEGATIVE = replace(KL, parameters={**KL.parameters, "reference_from": "none"})
KL_POSITIVE = replace(KL, parameters={**KL.parameters, "reference_from": "logps"})
# So many sequences that a low-precision sum loses more than one rounding of the result.
MANY = Point({"B": 128, "T": 1, "H": 16, "V": 24}, {"masked": 0.0})
#: Right candidates must pass at each of these points. Together they have every branch of the loss.
POINTS = (MODEL, KL, KL_NEGATIVE, KL_POSITIVE, AVERAGE, APO, NONE)


def _gradients(change: Change, *names: str) -> type[PlainKTO]:
    """Every gradient, or those of the named inputs, passed through ``change``."""

    class Mutant(PlainKTO):
        def gradient(self, name: str, gradient: Tensor) -> Tensor:
            return change(gradient) if not names or name in names else gradient

    return Mutant


def _received(change: Change) -> type[PlainKTO]:
    """Every floating input read through ``change``."""

    class Mutant(PlainKTO):
        def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: change(v) if v.is_floating_point() else v for k, v in given.items()}

    return Mutant


def _configured(**changes: object) -> type[PlainKTO]:
    class Mutant(PlainKTO):
        def __init__(self, **config: object) -> None:
            super().__init__(**{**config, **changes})  # type: ignore[arg-type]

    return Mutant


class BetaMissingInGradient(PlainKTO):
    def upstream(self, gradient: Tensor) -> Tensor:
        return gradient / self.config.beta


class ReferenceIgnored(PlainKTO):
    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for k, v in given.items() if not k.startswith("ref_")}


class KLSignFlipped(PlainKTO):
    def reference_point(self, t: KTOInputs) -> Tensor | None:
        kl = super().reference_point(t)
        return None if kl is None else -kl


class WrongCount(PlainKTO):
    def reduced(self, losses: Tensor) -> Tensor:
        return losses.sum() / (losses.numel() + 1)


class MaskOffByOne(PlainKTO):
    def unmasked(self, target: Tensor) -> Tensor:
        return super().unmasked(target).roll(1, 1)


class MaskedTokensInGradient(PlainKTO):
    """As in a fused backward that forgets the mask."""

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.masked = ~self.unmasked(given["target"]).unsqueeze(-1)
        return given

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        return torch.where(self.masked, gradient.abs().mean(), gradient) if name == "input" else gradient


class MaskedTokensInValue(PlainKTO):
    def unmasked(self, target: Tensor) -> Tensor:
        return torch.ones_like(target, dtype=torch.bool)


class UpstreamIgnored(PlainKTO):
    def upstream(self, gradient: Tensor) -> Tensor:
        return torch.ones_like(gradient)


class UpstreamSummed(PlainKTO):
    """One factor for all sequences, as if the loss were reduced."""

    def upstream(self, gradient: Tensor) -> Tensor:
        return gradient.mean().expand(gradient.shape)


class LogitsRounded(PlainKTO):
    """The logits are rounded to bfloat16, as plain PyTorch and the published losses do in bfloat16."""

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return rounded(torch.bfloat16)(super().logits(x, weight, bias))


class LogpsLeftToAutocast(PlainKTO):
    """Expects logits in float32. Under autocast on a CPU they, and all that follows from them, are in bfloat16."""

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.nn.functional.linear(x, weight, bias)


class SummedInBF16(PlainKTO):
    """The weight's gradient is added up over the sequences in bfloat16."""

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        copies = SummedInLowPrecision.apply(weight, x.shape[0])
        logits = torch.stack([torch.nn.functional.linear(*pair) for pair in zip(x, copies, strict=True)])
        return logits if bias is None else logits + bias


class LogitsAddedUpInBF16(PlainKTO):
    """An accumulator with too few bits: it is right for a few terms, and stops growing after many."""

    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        exact = super().logits(x, weight, bias)
        blocks = zip(x.detach().split(64, -1), weight.detach().split(64, -1), strict=True)
        total = torch.zeros_like(exact, dtype=torch.bfloat16)
        for part, rows in blocks:
            total += torch.nn.functional.linear(part, rows).to(torch.bfloat16)
        return exact + (total.to(exact.dtype) + (0 if bias is None else bias.detach()) - exact.detach())


class ScalesWeightInPlace(PlainKTO):
    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        given["weight"].detach().mul_(1.25)
        return given


class ClearsMaskedInPlace(PlainKTO):
    """A second run on the same inputs changes nothing more, so that only a fresh copy of the inputs shows it."""

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        given["input"].detach().masked_fill_(~self.unmasked(given["target"]).unsqueeze(-1), 0)
        return given


class ClearsInputInBackward(PlainKTO):
    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.given = given
        return given

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        self.given["input"].detach().zero_()
        return gradient


class ScalesUpstreamInPlace(PlainKTO):
    def upstream(self, gradient: Tensor) -> Tensor:
        return gradient.mul_(0.5).clone().mul_(2)


class Nondeterministic(PlainKTO):
    noise = DriftingUlp()

    def returned(self, loss: Tensor, sums: tuple[Tensor, ...]) -> Result:
        return self.noise(loss), sums


class NondeterministicGradient(PlainKTO):
    noise = DriftingUlp()

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        # In the dtype that is returned, because a change in float32's last place would be rounded away.
        return gradient if name != "weight" else self.noise(gradient.to(self.returned_in)).to(gradient.dtype)

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.returned_in = given["weight"].dtype
        return given


class DependsOnBatch(PlainKTO):
    """Each loss depends on the largest log-probability of the batch, as if the batch were one row of a softmax."""

    def losses(self, logps: Tensor, reference: Tensor | None, labels: Tensor, kl: Tensor | None) -> Tensor:
        return super().losses(logps, reference, labels, kl) + 1e-2 * logps.amax() / logps.numel()


class DependsOnPosition(PlainKTO):
    def losses(self, logps: Tensor, reference: Tensor | None, labels: Tensor, kl: Tensor | None) -> Tensor:
        losses = super().losses(logps, reference, labels, kl)
        return losses * (1 + 1e-2 * torch.arange(losses.numel(), dtype=losses.dtype))


class PaddingCounted(PlainKTO):
    """Padding at the end of a sequence has a small loss instead of none."""

    def unmasked(self, target: Tensor) -> Tensor:
        unmasked = super().unmasked(target)
        unmasked[:, 7:] = True  # the last three tokens of the padded run
        return unmasked


class AveragedOverAllTokens(PlainKTO):
    def means(self, sums: Tensor, counts: Tensor, target: Tensor) -> Tensor:
        return sums / target.shape[1]


class BiasGradientMissing(PlainKTO):
    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v.detach() if k == "bias" else v for k, v in given.items()}


class BiasGradientMisplaced(PlainKTO):
    """A backward that returns one gradient too few if the input needs none."""

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        alone = not given["input"].requires_grad
        return {k: with_gradient(v, times(-1.0)) if k == "bias" and alone else v for k, v in given.items()}


class ScalesSavedGradient(PlainKTO):
    """The forward computes the gradient, and each backward scales it in place: only the first one is right."""

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.passes = 0
        return given

    def gradient(self, name: str, gradient: Tensor) -> Tensor:
        self.passes += name == "weight"
        return gradient * 0.5 ** (self.passes - 1) if name == "weight" else gradient


class GradientWrittenOverInput(PlainKTO):
    """Published chunked losses do this with logits; here it happens to hidden states that others may read."""

    def receive(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        read = {k: v.clone() for k, v in given.items()}
        if not given["input"].is_leaf:
            given["input"].data.mul_(0.25)
        return read


class MetricsInAnotherDtype(PlainKTO):
    def returned(self, loss: Tensor, sums: tuple[Tensor, ...]) -> Result:
        return loss, tuple(s.to(torch.float64 if s.dtype == torch.float32 else torch.float32) for s in sums)


class LargeLogitsClipped(PlainKTO):
    def logits(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().logits(x, weight, bias).clamp(-500, 500)


class WeightsSwapped(PlainKTO):
    def losses(self, logps: Tensor, reference: Tensor | None, labels: Tensor, kl: Tensor | None) -> Tensor:
        c = self.config
        swapped = replace(c, desirable_weight=c.undesirable_weight, undesirable_weight=c.desirable_weight)
        return kto_losses(logps, reference, labels, kl, swapped)


class APOSignWrong(PlainKTO):
    def losses(self, logps: Tensor, reference: Tensor | None, labels: Tensor, kl: Tensor | None) -> Tensor:
        return 1 - super().losses(logps, reference, labels, kl)


class KLNotClamped(PlainKTO):
    def estimate(self, policy: Tensor, reference: Tensor) -> Tensor:
        return (policy - reference).mean().detach()


class KLNotDetached(PlainKTO):
    def estimate(self, policy: Tensor, reference: Tensor) -> Tensor:
        return (policy - reference).mean().clamp(min=0)


class LossAlone(PlainKTO):
    def returned(self, loss: Tensor, sums: tuple[Tensor, ...]) -> Result:
        return loss  # type: ignore[return-value]


class LossDetached(PlainKTO):
    def returned(self, loss: Tensor, sums: tuple[Tensor, ...]) -> Result:
        return loss.detach(), sums


class Raises(PlainKTO):
    def reduced(self, losses: Tensor) -> Tensor:
        raise ValueError("planted")


_BOTH = ("gradients", "gradcheck")
EVERY = (
    *("forward", "gradients", "gradcheck", "linearity", "determinism", "unmodified", "written", "strided"),
    *("gradient_subsets", "upstream", "graph", "structure", "special_values", "nonfinite"),
)

DEFECTS = (
    Defect("gradient scaled by 1.01", _gradients(times(1.01)), MODEL, _BOTH),
    Defect("gradient halved", _gradients(times(0.5)), MODEL, _BOTH),
    Defect("gradient's sign flipped", _gradients(times(-1.0)), NONE, _BOTH),
    Defect("beta missing in the gradient", BetaMissingInGradient, MODEL, _BOTH),
    Defect("reference model ignored", ReferenceIgnored, MODEL, ("forward", "gradients")),
    Defect("reference log-probabilities ignored", ReferenceIgnored, APO, ("forward", "gradients")),
    Defect("KL's sign flipped", KLSignFlipped, AVERAGE, ("forward", "gradients")),
    Defect("mean over a wrong count", WrongCount, MODEL, ("forward", "gradients", "law:batch-split")),
    Defect("mask off by one", MaskOffByOne, MODEL, ("forward", "gradients")),
    Defect("masked tokens in the gradient", MaskedTokensInGradient, MODEL, _BOTH),
    Defect("masked tokens in the value", MaskedTokensInValue, MODEL, ("forward", "gradients", "law:masked-tokens")),
    Defect("ignore_index is always -100", _configured(ignore_index=-100), AVERAGE, ("forward", "law:padding")),
    Defect("upstream gradient ignored", UpstreamIgnored, MODEL, ("gradients", "linearity", "upstream")),
    Defect("upstream gradient summed", UpstreamSummed, NONE, ("gradients", "gradcheck", "law:batch-split", "upstream")),
    Defect("a row of grad_input zero", _gradients(last_row_zero, "input"), MODEL, _BOTH),
    Defect("a row of grad_weight zero", _gradients(last_row_zero, "weight"), MODEL, _BOTH),
    Defect("last vocabulary tile of grad_weight missing", _gradients(last_tile_missing, "weight"), MODEL, _BOTH),
    Defect("last vocabulary tile of grad_bias missing", _gradients(last_tile_missing, "bias"), MODEL, _BOTH),
    Defect("a tile of grad_weight unwritten", _gradients(tile_unwritten, "weight"), MODEL, ("written",)),
    Defect("a tile of grad_bias unwritten", _gradients(tile_unwritten, "bias"), MODEL, ("written",)),
    Defect("gradients truncated to bf16", _gradients(truncated_to_bf16), MODEL, ("gradients", "bias")),
    Defect("logits rounded to bf16", LogitsRounded, MODEL, ("forward",)),
    Defect("logits rounded to bf16, gradients", LogitsRounded, MODEL, ("gradients",), ("fp16", "fp32", "fp64")),
    Defect("grad_weight summed in bf16", SummedInBF16, MANY, ("gradients",)),
    Defect("logits added up in bf16", LogitsAddedUpInBF16, MODEL, ("growth",)),
    Defect("weight scaled in place", ScalesWeightInPlace, MODEL, ("unmodified",)),
    Defect("masked tokens cleared in place", ClearsMaskedInPlace, MODEL, ("unmodified",)),
    Defect("input cleared by backward", ClearsInputInBackward, MODEL, ("unmodified",)),
    Defect("upstream gradient scaled in place", ScalesUpstreamInPlace, MODEL, ("unmodified",)),
    Defect("upstream gradients scaled in place", ScalesUpstreamInPlace, NONE, ("unmodified",)),
    Defect("loss differs from run to run", Nondeterministic, MODEL, ("determinism",)),
    Defect("gradient differs from run to run", NondeterministicGradient, MODEL, ("determinism",)),
    Defect("strides ignored", _received(as_if_contiguous), MODEL, ("strided",)),
    Defect("reads past the end", _received(reading_past_the_end), MODEL, ("strided",)),
    Defect("depends on the batch", DependsOnBatch, NONE, ("forward", "law:batch-split")),
    Defect("depends on the position", DependsOnPosition, NONE, ("forward", "law:permutation")),
    Defect("padding counted", PaddingCounted, MODEL, ("law:padding",)),
    Defect("average over all tokens", AveragedOverAllTokens, AVERAGE, ("forward", "gradients", "law:padding")),
    Defect("bias gradient missing", BiasGradientMissing, MODEL, ("gradients",), breaks=True),
    Defect("bias gradient missing, by differences", BiasGradientMissing, MODEL, ("gradcheck",)),
    Defect("bias gradient wrong without the input's", BiasGradientMisplaced, MODEL, ("gradient_subsets",)),
    Defect("weight gradient scaled where it was saved", ScalesSavedGradient, MODEL, ("graph",)),
    Defect("gradient written over the input", GradientWrittenOverInput, MODEL, ("graph",)),
    Defect("metrics of another dtype", MetricsInAnotherDtype, MODEL, ("structure",)),
    Defect("large logits clipped", LargeLogitsClipped, MODEL, ("special_values",)),
    Defect("NaN hidden", _received(torch.nan_to_num), MODEL, ("nonfinite",)),
    Defect("weights swapped", WeightsSwapped, KL, ("forward", "gradients")),
    Defect("APO's sign wrong", APOSignWrong, APO, ("forward", "gradients")),
    Defect("KL not clamped", KLNotClamped, KL_NEGATIVE, ("forward", "gradients")),
    Defect("KL not detached", KLNotDetached, KL_POSITIVE, ("gradients",)),
    Defect("loss alone returned", LossAlone, MODEL, EVERY, breaks=True),
    Defect("loss detached", LossDetached, MODEL, ("gradients",), breaks=True),
    Defect("loss detached, by differences", LossDetached, MODEL, ("gradcheck",)),
    Defect("log-probabilities left to autocast", LogpsLeftToAutocast, MODEL, ("autocast",), ("fp32",)),
    Defect("raises", Raises, MODEL, EVERY, breaks=True),
)
