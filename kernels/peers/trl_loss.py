"""TRL's published KTO loss as a candidate: ``KTOTrainer`` itself, run on given hidden states and a given head.

Hugging Face's trainer takes a language model and token ids. Here its own ``compute_loss`` runs on a model whose
backbone returns the caller's hidden states. The model's head is the caller's weight, patched by TRL's own
``add_fused_lm_head``. All arithmetic is TRL's. This file only passes tensors in and metrics out. Written for trl 1.16
(https://github.com/huggingface/trl, ``trl/trainer/kto_trainer.py`` and ``trl/trainer/utils.py``).
"""

from __future__ import annotations

import importlib
import warnings
from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ktonum.errors import InputError, UsageError
from ktonum.kernels.contract.config import KTOConfig, LossType
from ktonum.kernels.contract.inputs import KTOInputs, check_structure

__all__ = ["TRLKTOLoss"]

# They tell the backbone which of the batch's two sets of sequences a call is for. KTOTrainer passes both to the model
# under the same keyword.
_SEQUENCES, _KL_SEQUENCES = "sequences", "kl"


class _HeadModel(torch.nn.Module):
    """What ``add_fused_lm_head`` and ``KTOTrainer`` need from a causal language model, around the caller's tensors.

    Neither weight nor bias is a `torch.nn.Parameter` of this module. The caller's tensors are used as they are, so that
    nothing is copied, and gradients arrive at the caller's tensors.
    """

    is_gradient_checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        self.hidden: dict[str, Tensor] = {}
        self.head = SimpleNamespace(weight=None, bias=None)
        # No soft-capping, no logit scale: the head is a plain linear layer.
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def hold(self, weight: Tensor, bias: Tensor | None, sequences: Tensor | None, kl_sequences: Tensor | None) -> None:
        """Use these hidden states, (B, T, H), and this head until the next call."""
        self.head.weight, self.head.bias = weight, bias
        named = {_SEQUENCES: sequences, _KL_SEQUENCES: kl_sequences}
        self.hidden = {name: states for name, states in named.items() if states is not None}

    def release(self) -> None:
        """Let go of the caller's tensors."""
        self.hidden, self.head.weight, self.head.bias = {}, None, None

    def base_model(self, *, token_type_ids: str, **_: object) -> SimpleNamespace:
        """The backbone: it returns the hidden states, (B, T + 1, H)."""
        # TRL scores label t + 1 with hidden state t and drops the last state. With one more state, which it never
        # reads, all T states count.
        return SimpleNamespace(last_hidden_state=torch.nn.functional.pad(self.hidden[token_type_ids], (0, 0, 0, 1)))

    def get_output_embeddings(self) -> SimpleNamespace:
        """The head."""
        return self.head

    def forward(self, *_: object, **__: object) -> Any:
        """Replaced by ``add_fused_lm_head``."""
        raise NotImplementedError("call with fused_lm_head=True")


class TRLKTOLoss(torch.nn.Module):
    """TRL's KTO loss behind the interface of Liger-Kernel's ``LigerFusedLinearKTOLoss``, as far as TRL has it.

    TRL has neither ``average_log_prob`` nor a reduction other than the mean, so there are no such keywords. It computes
    in float32, from logits of the inputs' dtype. A single ``kl`` >= 0 reaches its code as one KL sequence without
    tokens: the policy's log-probability of that is 0, and the reference's is −kl.

    Args:
        ignore_index: Target value that marks a token as no part of the completion; becomes TRL's completion mask.
        beta, loss_type, desirable_weight, undesirable_weight: As in TRL's ``KTOConfig``.
        use_ref_model: Whether ``forward`` uses its reference tensors. TRL always has a reference; without one, its
            precomputed reference log-probabilities are 0 here.

    Raises:
        InputError: A parameter is not accepted.
        UsageError: TRL, or something that it imports, is not installed.
    """

    #: Which of Liger-Kernel's six metrics TRL reports. The others are None in the result: TRL's metric of logits is a
    #: mean over unmasked tokens, where Liger-Kernel's is a sum over all of them.
    metrics: ClassVar[tuple[str, ...]] = (
        "chosen_logps_sum",
        "rejected_logps_sum",
        "chosen_rewards_sum",
        "rejected_rewards_sum",
    )

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        use_ref_model: bool = False,
        loss_type: LossType = "kto",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.use_ref_model = use_ref_model
        self.config = KTOConfig(
            loss_type=loss_type,
            beta=beta,
            desirable_weight=desirable_weight,
            undesirable_weight=undesirable_weight,
            ignore_index=ignore_index,
        )
        trainer_class, add_fused_lm_head = _trl()
        self._policy, self._reference = _HeadModel(), _HeadModel()
        # The outputs that the trainer itself asks for, because they cost time in its forward pass.
        add_fused_lm_head(self._policy, outputs=("log_probs", "entropy", "mean_logits"))
        add_fused_lm_head(self._reference)
        # The trainer's constructor needs a data set, a tokenizer and an output folder. Its loss needs only what
        # follows.
        trainer = object.__new__(trainer_class)
        trainer.model, trainer.ref_model = self._policy, self._reference
        trainer.args = SimpleNamespace(gradient_checkpointing_kwargs=None, max_length=None)
        trainer.loss_type, trainer.beta = loss_type, beta
        trainer.desirable_weight, trainer.undesirable_weight = desirable_weight, undesirable_weight
        trainer.aux_loss_enabled = False
        trainer._total_train_tokens, trainer._tp_size = 0, 1
        self._trainer: Any = trainer

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        preference_labels: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        kl: Tensor | None = None,
        *,
        ref_logps: Tensor | None = None,
        kl_input: Tensor | None = None,
        kl_target: Tensor | None = None,
        kl_ref_input: Tensor | None = None,
        kl_ref_logps: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The loss and the metrics; shapes as in `KTOInputs`.

        Returns:
            The mean loss, a float32 scalar, and six metrics in the order of `ktonum.kernels.contract.formula.METRICS`:
            float32 scalars, None for those that `metrics` lacks.

        Raises:
            InputError: An argument does not fit, or TRL cannot take it.
        """
        if self.use_ref_model and ref_input is None and ref_logps is None:
            raise InputError("use_ref_model=True needs ref_input and ref_weight, or ref_logps; none was given")
        if not self.use_ref_model and any(r is not None for r in (ref_input, ref_weight, ref_bias, ref_logps)):
            warnings.warn("the reference's tensors are not used, since use_ref_model=False", stacklevel=2)
            ref_input = ref_weight = ref_bias = ref_logps = kl_ref_input = kl_ref_logps = None
        inputs = KTOInputs(
            input=_input,
            weight=lin_weight,
            target=target,
            preference_labels=preference_labels,  # type: ignore[arg-type]  # None is refused with a message of its own
            bias=bias,
            ref_input=ref_input,
            ref_weight=ref_weight,
            ref_bias=ref_bias,
            ref_logps=ref_logps,
            kl=kl,
            kl_input=kl_input,
            kl_target=kl_target,
            kl_ref_input=kl_ref_input,
            kl_ref_logps=kl_ref_logps,
        )
        check_structure(inputs, self.config)
        _check_accepted(inputs)
        try:
            return self._compute(inputs)
        finally:
            self._policy.release()
            self._reference.release()

    def _compute(self, inputs: KTOInputs) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The result of ``KTOTrainer.compute_loss``, and the metrics that it logged."""
        trainer, device = self._trainer, inputs.input.device
        trainer.accelerator = SimpleNamespace(
            device=device, gather_for_metrics=lambda tensor: tensor, autocast=nullcontext, unwrap_model=lambda m: m
        )
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer.calculate_KL = inputs.kl is not None or inputs.kl_input is not None
        batch = _sequences(inputs.target, self.config.ignore_index) | {
            "token_type_ids": _SEQUENCES,
            "label": inputs.preference_labels,
        }
        kl_input, kl_target = inputs.kl_input, inputs.kl_target
        if inputs.kl is not None:
            kl_input = inputs.input.detach()[:1, :1]
            kl_target = inputs.target.new_full((1, 1), self.config.ignore_index)
        if kl_input is not None and kl_target is not None:
            batch |= {f"KL_{k}": v for k, v in _sequences(kl_target, self.config.ignore_index).items()}
            batch["KL_token_type_ids"] = _KL_SEQUENCES
        self._policy.hold(inputs.weight, inputs.bias, inputs.input, kl_input)
        trainer.precompute_ref_logps = inputs.ref_input is None or inputs.kl is not None
        if inputs.ref_input is not None and inputs.ref_weight is not None:
            self._reference.hold(inputs.ref_weight, inputs.ref_bias, inputs.ref_input, inputs.kl_ref_input)
        if trainer.precompute_ref_logps:
            batch |= self._reference_logps(inputs, batch)
        loss: Tensor = trainer.compute_loss(self._policy, batch)
        logged = trainer._metrics["train" if self._policy.training else "eval"]
        desirable = int(inputs.preference_labels.sum())
        counts = {"chosen": desirable, "rejected": inputs.preference_labels.numel() - desirable}

        def total(name: str, label: str) -> Tensor:
            # TRL logs a mean as a Python number in float64, which gives the float32 sum back exactly.
            means = logged.get(f"{name}/{label}", [0.0])
            return torch.tensor(means[-1] * counts[label], dtype=torch.float32, device=device)

        logps, rewards = ([total(name, label) for label in counts] for name in ("logps", "rewards"))
        return loss, (*logps, None, None, *rewards)

    def _reference_logps(self, inputs: KTOInputs, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The batch's precomputed reference log-probabilities, as ``precompute_ref_log_probs=True`` has them."""
        size, device = inputs.target.shape[0], inputs.input.device
        if inputs.ref_logps is not None:
            logps = inputs.ref_logps
        elif inputs.ref_input is not None:
            with torch.no_grad():
                logps = self._sequence_logps(batch)
        else:
            logps = torch.zeros(size, device=device)
        # float32, as the collator's tensors are.
        found = {"ref_logps": logps.detach().float()}
        if inputs.kl is not None:
            found["ref_KL_logps"] = -inputs.kl.detach().float().reshape(1)
        elif inputs.kl_ref_logps is not None:
            found["ref_KL_logps"] = inputs.kl_ref_logps.detach().float()
        elif inputs.kl_input is not None:
            found["ref_KL_logps"] = torch.zeros(inputs.kl_input.shape[0], device=device)
        return found

    def _sequence_logps(self, batch: dict[str, Any]) -> Tensor:
        """The reference model's log-probabilities, (B,), by the trainer's own scoring of a batch."""
        # The trainer's `compute_ref_log_probs` passes no token types, so it cannot tell the sequences apart. Its
        # function for KL sequences can; it takes the sequences as if they were KL sequences.
        scored = {f"KL_{k}": batch[k] for k in ("input_ids", "attention_mask", "completion_mask", "token_type_ids")}
        logps: Tensor = self._trainer._compute_kl_logps(self._reference, scored)
        return logps


def _trl() -> tuple[Any, Any]:
    """TRL's trainer class and its patch of the head; both load transformers, accelerate and datasets."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer = importlib.import_module("trl.trainer.kto_trainer")
            heads = importlib.import_module("trl.trainer.utils")
        return trainer.KTOTrainer, heads.add_fused_lm_head
    except (ImportError, RuntimeError, AttributeError) as error:
        raise UsageError(
            f"TRL's KTO trainer, 1.16 or later, cannot be imported ({error}): pip install 'ktonum[peers]'"
        ) from error


def _check_accepted(inputs: KTOInputs) -> None:
    """Refuse what a KTO loss accepts but TRL's trainer cannot take."""
    if inputs.kl is not None and inputs.kl.numel() != 1:
        raise InputError(
            f"kl has shape {tuple(inputs.kl.shape)}: TRL has one KL reference point a batch; pass a scalar"
        )
    if inputs.kl is not None and bool(inputs.kl < 0):
        raise InputError(f"kl = {inputs.kl.item()}: TRL clamps its KL reference point at 0; pass kl >= 0")
    if (inputs.ref_input is None) != (inputs.kl_ref_input is None) and inputs.kl_input is not None:
        if inputs.ref_logps is not None or inputs.kl_ref_logps is not None:
            raise InputError(
                "TRL precomputes all reference log-probabilities or none: pass ref_logps and kl_ref_logps, or "
                "ref_input and kl_ref_input"
            )


def _sequences(target: Tensor, ignore_index: int) -> dict[str, Any]:
    """Token ids and masks as TRL's data collator makes them, (B, T + 1): a prompt of one token before the targets."""
    unmasked = torch.nn.functional.pad((target != ignore_index).long(), (1, 0))
    return {
        "input_ids": torch.nn.functional.pad(target.long(), (1, 0)),
        "attention_mask": torch.ones_like(unmasked),
        "completion_mask": unmasked,
    }
