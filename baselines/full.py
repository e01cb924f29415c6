"""Full fine-tuning: every weight is trained, whatever the budget says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from baselines.contestant import AdamWContestant, is_quantised, train_in_fp32


@dataclass(frozen=True)
class Full:
    """AdamW on all weights, in fp32 even where the model is in 16 bits if `in_fp32`."""

    in_fp32: bool = True

    def prepare(self, model: PreTrainedModel, budget: Any, total_steps: int) -> AdamWContestant:
        if is_quantised(model):
            raise ValueError("full cannot train a quantised model: its weights have no gradient")
        model.requires_grad_(True)
        if self.in_fp32:
            train_in_fp32(model)
        return AdamWContestant(model)

    def size(self, model: PreTrainedModel, budget: Any) -> int:
        return sum(weight.numel() for weight in model.parameters())
