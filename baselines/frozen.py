"""The floor: a forward and a backward pass of a model of which nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from baselines.base import Untouched


class Floor(Untouched):
    """Has a backward pass down to the first layer's inputs, as adapters have."""

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """One that has nothing to do: torch's refuse to have no parameter at all."""
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(0))], lr=lr)


@dataclass(frozen=True)
class Frozen:
    """What a step costs whatever the method: no method that trains all layers can cost less."""

    def prepare(self, model: Any, budget: Any, total_steps: int) -> Floor:
        model.requires_grad_(False)
        model.enable_input_require_grads()
        # The Trainer takes quantised models with adapters only, as the others cannot be trained.
        model._hf_peft_config_loaded = True
        return Floor(model)

    def size(self, model: torch.nn.Module, budget: Any) -> int:
        return 0
