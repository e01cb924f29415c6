"""What most methods make ready: a model whose trainable weights AdamW trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel, get_peft_model

if TYPE_CHECKING:
    from peft import PeftMixedModel
    from transformers import PreTrainedModel, TrainerCallback


@dataclass(frozen=True)
class AdamWContestant:
    """A model of transformers or peft; its weights with `requires_grad` are what is trained."""

    model: PreTrainedModel | PeftModel | PeftMixedModel
    callbacks: Sequence[TrainerCallback] = ()

    @property
    def trainable(self) -> list[torch.nn.Parameter]:
        return [weight for weight in self.model.parameters() if weight.requires_grad]

    @property
    def num_trainable(self) -> int:
        return sum(weight.numel() for weight in self.trainable)

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """AdamW (arXiv 1711.05101) with torch's betas and eps."""
        return torch.optim.AdamW(self.trainable, lr=lr, weight_decay=weight_decay)

    def artifact(self, path: Path) -> None:
        """Writes what `save_pretrained` writes: an adapter for peft's models, else all weights."""
        self.model.save_pretrained(str(path))


def adapted(
    name: str,
    model: torch.nn.Module,
    config: PeftConfig,
    in_fp32: bool = True,
) -> AdamWContestant:
    """`model` with the adapter that `config` describes; the adapter's weights are trained.

    They are fp32 even where the model is in 16 bits, which is peft's default, if `in_fp32`; so
    are those that peft leaves in 16 bits, as copies of the model's own.

    Raises ValueError if the model is quantised and peft's method does not train on that; the
    message says `name`, whatever peft says where there is no quantisation.
    """
    if not is_quantised(model):
        return _wrapped(model, config, in_fp32)
    try:
        contestant = _wrapped(model, config, in_fp32)
        rehearse(contestant)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of many classes, as each method fails in its own way
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"{name} does not train on a quantised model: {reason}") from error
    return contestant


def _wrapped(model: torch.nn.Module, config: PeftConfig, in_fp32: bool) -> AdamWContestant:
    contestant = AdamWContestant(get_peft_model(model, config, autocast_adapter_dtype=in_fp32))
    if in_fp32:
        train_in_fp32(contestant.model)
    return contestant


def train_in_fp32(model: PreTrainedModel | PeftModel | PeftMixedModel) -> None:
    """Makes the trained weights of `model` fp32, so that no update is too small for them.

    If there were any in 16 bits, torch's autocast computes in that dtype, in training and after
    (mixed precision, arXiv 1710.03740).
    """
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    narrow = [weight for weight in trained if weight.dtype != torch.float32]
    if narrow:
        autocast = torch.autocast(narrow[0].device.type, narrow[0].dtype)
        for weight in narrow:
            weight.data = weight.data.float()
        # The innermost model, which peft's own generate() goes straight to.
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.forward = autocast(inner.forward)


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether transformers holds some of the weights of `model` in fewer bits."""
    return bool(getattr(model, "is_quantized", False))


def rehearse(contestant: AdamWContestant) -> None:
    """One step's gradients of two tokens, thrown away: what peft builds may still fail to run."""
    model = contestant.model
    was_training = model.training
    tokens = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    with torch.random.fork_rng():
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
    model.train(was_training)
    without = sum(weight.grad is None for weight in contestant.trainable)
    model.zero_grad(set_to_none=True)
    if without:
        raise RuntimeError(f"{without} of its tensors get no gradient")
