"""LoRA (arXiv 2106.09685) as peft ships it, its rank solved from the budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from baselines.contestant import AdamWContestant


@dataclass(frozen=True)
class Lora:
    """One rank for all targets; alpha follows it, so that the update's scale does not change."""

    alpha_over_rank: float = 2.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.alpha_over_rank <= 0:
            raise ValueError(f"alpha_over_rank must be positive, got {self.alpha_over_rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def prepare(self, model: torch.nn.Module, budget: Any, total_steps: int) -> AdamWContestant:
        rank = solve_rank(model, budget)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=self.alpha_over_rank * rank,
            lora_dropout=self.dropout,
            target_modules=list(budget.target_modules),
        )
        return AdamWContestant(get_peft_model(model, config))


def solve_rank(model: torch.nn.Module, budget: Any) -> int:
    """The rank whose r x sum(in + out) over the targeted linears is nearest to the budget."""
    num_weights = budget.num_weights(model)  # raises where there are no targets
    sides = sum(
        module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] in budget.target_modules
    )
    return max(1, round(num_weights / sides))
