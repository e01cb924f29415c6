"""LoRA (arXiv 2106.09685) and its variants as peft ships them, ranks solved from the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig

from baselines import sizing
from baselines.contestant import AdamWContestant, adapted


@dataclass(frozen=True)
class Lora:
    """Alpha follows the rank, so that the update's scale does not change with the budget, unless
    `variant` has a `lora_alpha` of its own.

    `variant` is what else differs from peft's LoraConfig, as {"use_dora": True}; `in_fp32` as in
    `baselines.contestant.adapted`. One rank for all targets wherever one comes within 1 % of the
    budget, else some have one more than others.
    """

    alpha_over_rank: float = 2.0
    dropout: float = 0.0
    name: str = "lora"
    variant: Mapping[str, Any] = field(default_factory=dict)
    in_fp32: bool = True

    def __post_init__(self) -> None:
        if self.alpha_over_rank <= 0:
            raise ValueError(f"alpha_over_rank must be positive, got {self.alpha_over_rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")

    def prepare(self, model: torch.nn.Module, budget: Any, total_steps: int) -> AdamWContestant:
        ranks = self.ranks(model, budget)
        rank = min(ranks.values())
        higher = {name: own for name, own in ranks.items() if own > rank}
        options: dict[str, Any] = dict(self.variant)
        if "lora_alpha" not in options:
            options["lora_alpha"] = self.alpha_over_rank * rank
            options["alpha_pattern"] = {n: self.alpha_over_rank * own for n, own in higher.items()}
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            rank_pattern=higher,
            lora_dropout=self.dropout,
            target_modules=list(budget.target_modules),
            **options,
        )
        return adapted(self.name, model, config, in_fp32=self.in_fp32)

    def size(self, model: torch.nn.Module, budget: Any) -> int:
        sides = {name: sum(shape) for name, shape in budget.target_shapes(model).items()}
        ranks = self.ranks(model, budget)
        return sum(rank * sides[name] for name, rank in ranks.items()) + self._extra(model, budget)

    def ranks(self, model: torch.nn.Module, budget: Any) -> dict[str, int]:
        """The rank of each targeted module by its full name.

        Raises ValueError if the budget is more than every target has at full rank.
        """
        asked = budget.num_weights(model)  # raises where there are no targets
        shapes = budget.target_shapes(model)
        extra = self._extra(model, budget)
        most = sizing.full_rank(shapes) * budget.num_sides(model) + extra
        refusal = f"{self.name} cannot have {asked} weights (budget {budget.label})"
        sizing.require_enough(most, asked, refusal)
        return solve_ranks({name: sum(shape) for name, shape in shapes.items()}, asked - extra)

    def _extra(self, model: torch.nn.Module, budget: Any) -> int:
        """Weights beside the two matrices: DoRA's magnitudes, one an output (arXiv 2402.09353)."""
        if not self.variant.get("use_dora"):
            return 0
        return sum(num_out for num_out, _ in budget.target_shapes(model).values())


def solve_ranks(sides: Mapping[str, int], asked: int) -> dict[str, int]:
    """Ranks, one or one more than another, whose r x (in + out) sum up to about `asked`."""
    whole = sum(sides.values())
    rank = max(1, round(asked / whole))
    if abs(rank * whole - asked) <= sizing.TOLERANCE * asked or asked < whole:
        return dict.fromkeys(sides, rank)
    ranks = dict.fromkeys(sides, asked // whole)
    missing = asked % whole
    for name in sorted(sides, key=lambda name: -sides[name]):
        if 2 * missing > sides[name]:  # one more comes nearer than none
            ranks[name] += 1
            missing -= sides[name]
    return ranks
