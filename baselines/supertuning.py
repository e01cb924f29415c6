"""Super-Tuning (arXiv 2607.09287) as peft ships it: the largest weights, and low rank if asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import SupertuningConfig

from baselines import sizing
from baselines.contestant import AdamWContestant, adapted


@dataclass(frozen=True)
class Supertuning:
    """`low_rank_share` of the budget goes to a LoRA beside the sparse weights, if it is not 0.

    Then it is the paper's Supra, which is RoSA's form (arXiv 2401.04679), sparse + low rank, with
    a support chosen by magnitude instead of by gradients.
    """

    name: str
    low_rank_share: float
    select_top: bool
    alpha_over_rank: float

    def __post_init__(self) -> None:
        if not 0 <= self.low_rank_share < 1:
            raise ValueError(f"low_rank_share must be in [0, 1), got {self.low_rank_share}")

    def prepare(self, model: torch.nn.Module, budget: Any, total_steps: int) -> AdamWContestant:
        rank, sparsity = self._solved(model, budget)
        config = SupertuningConfig(
            task_type="CAUSAL_LM",
            sparsity=sparsity,
            select_top=self.select_top,
            r=rank,
            lora_alpha=None if rank is None else self.alpha_over_rank * rank,
            target_modules=list(budget.target_modules),
        )
        return adapted(self.name, model, config)

    def size(self, model: torch.nn.Module, budget: Any) -> int:
        rank, sparsity = self._solved(model, budget)
        return kept(_numels(model, budget), sparsity) + (rank or 0) * budget.num_sides(model)

    def _solved(self, model: torch.nn.Module, budget: Any) -> tuple[int | None, float]:
        """The rank, if it is to have one, and the sparsity.

        Raises ValueError if the budget is too small for every target to have its share, or if it
        is more than the targets' weights.
        """
        asked, numels = budget.num_weights(model), _numels(model, budget)
        rank = self._rank(asked, budget.num_sides(model))
        num_sparse = asked - (rank or 0) * budget.num_sides(model)
        if num_sparse < len(numels):
            raise ValueError(
                f"{self.name} cannot have as few as {asked} weights (budget {budget.label}): "
                f"each of {len(numels)} targets needs one, and its rank one if it has any"
            )
        refusal = f"{self.name} cannot have {num_sparse} sparse weights (budget {budget.label})"
        sizing.require_enough(sum(numels), num_sparse, refusal)
        return rank, solve_sparsity(numels, num_sparse)

    def _rank(self, asked: int, num_sides: int) -> int | None:
        if self.low_rank_share == 0:
            return None
        return max(1, round(self.low_rank_share * asked / num_sides))


def _numels(model: torch.nn.Module, budget: Any) -> list[int]:
    return [rows * columns for rows, columns in budget.target_shapes(model).values()]


def solve_sparsity(numels: Sequence[int], asked: int) -> float:
    """The largest sparsity at which peft keeps at least `asked` of weights with `numels`."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(numels, middle) >= asked else (low, middle)
    return low


def kept(numels: Sequence[int], sparsity: float) -> int:
    """How many peft trains, which rounds down in each weight."""
    return sum(int(numel * (1 - sparsity)) for numel in numels)
