"""SpIEL as a contestant of the arena: fulfils the contract of `suites.methods`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import TrainerCallback

from spiel import ops
from spiel.budget import share_out
from spiel.callback import SpielCallback
from spiel.config import SpielConfig
from spiel.optim import SpielAdamW
from spiel.sm3 import SpielSM3


class Budget(Protocol):
    """What a method must know of its budget; `suites.suite.Budget` is one."""

    @property
    def target_modules(self) -> tuple[str, ...]: ...

    @property
    def label(self) -> str: ...

    def num_weights(self, model: nn.Module) -> int: ...

    def target_shapes(self, model: nn.Module) -> dict[str, tuple[int, int]]: ...


@dataclass
class SpielContestant:
    """A model with a SpIEL adapter, ready to train."""

    model: PeftModel
    callbacks: Sequence[TrainerCallback]
    num_trainable: int
    growth: str
    #: Which ops had formed gradients in this process before.
    earlier_calls: Counter[str] = field(default_factory=ops.backend_calls.copy)

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        optimizer = SpielSM3 if self.growth == "ma" else SpielAdamW
        return optimizer(self.model, lr=lr, weight_decay=weight_decay)

    @property
    def backend(self) -> str | None:
        """The ops that have formed gradients in this process since, for the record."""
        return ", ".join(sorted(ops.backend_calls - self.earlier_calls)) or None

    def artifact(self, path: Path) -> None:
        self.model.save_pretrained(str(path))


@dataclass(frozen=True)
class Spiel:
    """SpIEL with the hyper-parameters of SpielConfig."""

    growth: str
    reselection_steps: int
    selection_accumulation_steps: int
    initial_reselection_rate: float
    reselection_rate_policy: str

    @property
    def min_steps(self) -> int:
        """The fewest train steps that have a reselection."""
        return self.selection_accumulation_steps + 1

    def prepare(self, model: nn.Module, budget: Budget, total_steps: int) -> SpielContestant:
        config = SpielConfig(
            growth=self.growth,
            num_tunable_weights=self._num_weights(model, budget),
            reselection_steps=self.reselection_steps,
            selection_accumulation_steps=self.selection_accumulation_steps,
            initial_reselection_rate=self.initial_reselection_rate,
            reselection_rate_policy=self.reselection_rate_policy,
            target_modules=list(budget.target_modules),
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        made = adapted.active_peft_config
        sizes = [(k, math.prod(made.weight_shapes[name])) for name, k in made.num_deltas.items()]
        ops.settle(adapted.device, adapted.dtype, sizes)
        num_trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        return SpielContestant(adapted, [SpielCallback()], num_trainable, self.growth)

    def size(self, model: nn.Module, budget: Budget) -> int:
        shapes = budget.target_shapes(model)
        return sum(share_out(self._num_weights(model, budget), shapes).values())

    def _num_weights(self, model: nn.Module, budget: Budget) -> int:
        """Raises ValueError if the budget is more than the targeted weights."""
        asked = budget.num_weights(model)
        most = sum(math.prod(shape) for shape in budget.target_shapes(model).values())
        if asked > most:
            raise ValueError(
                f"spiel-{self.growth} cannot have {asked} weights (budget {budget.label}); "
                f"the most it can have is {most}"
            )
        return asked
