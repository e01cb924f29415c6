"""Full fine-tuning: every weight is trained, whatever the budget says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from baselines.contestant import AdamWContestant


@dataclass(frozen=True)
class Full:
    """AdamW on all weights."""

    def prepare(self, model: torch.nn.Module, budget: Any, total_steps: int) -> AdamWContestant:
        return AdamWContestant(model.requires_grad_(True))
