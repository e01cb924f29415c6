"""Full fine-tuning: every weight is trained, whatever the budget says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from baselines.contestant import AdamWContestant, is_quantised


@dataclass(frozen=True)
class Full:
    """AdamW on all weights."""

    def prepare(self, model: PreTrainedModel, budget: Any, total_steps: int) -> AdamWContestant:
        if is_quantised(model):
            raise ValueError("full cannot train a quantised model: its weights have no gradient")
        return AdamWContestant(model.requires_grad_(True))

    def size(self, model: PreTrainedModel, budget: Any) -> int:
        return sum(weight.numel() for weight in model.parameters())
