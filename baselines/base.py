"""The pretrained model as it is: what every other contestant starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from baselines.contestant import AdamWContestant


class Untouched(AdamWContestant):
    """Nothing is trained, so nothing is kept."""

    def artifact(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)


@dataclass(frozen=True)
class Base:
    """No training at all."""

    def prepare(self, model: PreTrainedModel, budget: Any, total_steps: int) -> Untouched:
        return Untouched(model.requires_grad_(False))

    def size(self, model: PreTrainedModel, budget: Any) -> int:
        return 0
