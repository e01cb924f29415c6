"""What most methods make ready: a model whose trainable weights AdamW trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import TrainerCallback


@dataclass(frozen=True)
class AdamWContestant:
    """A model of transformers or peft; its weights with `requires_grad` are what is trained."""

    model: torch.nn.Module
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
        self.model.save_pretrained(path)
