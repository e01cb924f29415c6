"""The contract a method fulfils, and METHODS: the table of those there are.

A method is one class in `baselines` or `spiel`, named here by an entry point so that listing
methods imports none of them, together with every hyper-parameter it takes. Learning rates are
the suites' (see `suites.suite.Tuning`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from transformers import TrainerCallback

    from suites.suite import Budget


class Contestant(Protocol):
    """A model made ready by a method, and what the arena needs to train and weigh it."""

    #: What is trained and evaluated: a transformers model, or a peft model around one.
    model: torch.nn.Module
    #: Callbacks the method needs inside transformers' Trainer.
    callbacks: Sequence[TrainerCallback]
    #: Weights that training changes.
    num_trainable: int

    def optimizer(self, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        """A fresh optimiser over the trainable weights."""
        ...

    def artifact(self, path: Path) -> None:
        """Writes into the folder `path` what a user would keep of this training."""
        ...


class Method(Protocol):
    """A way to fine-tune: a frozen dataclass whose fields are its hyper-parameters."""

    def prepare(self, model: torch.nn.Module, budget: Budget, total_steps: int) -> Contestant:
        """Makes `model` trainable within `budget`; random choices follow torch's global seed."""
        ...


@dataclass(frozen=True)
class Entry:
    """One line of METHODS."""

    description: str
    #: "module:Class" of the Method.
    entry_point: str
    #: The Method's fields, every one of them: they are hashed and recorded.
    options: Mapping[str, Any] = field(default_factory=dict)
    #: False for a method that changes no weight: it has no learning rate and no training.
    trains: bool = True
    #: False for a method without a size knob, which no table may call matched.
    matched: bool = True

    def load(self) -> Method:
        module, _, name = self.entry_point.partition(":")
        return getattr(importlib.import_module(module), name)(**self.options)


METHODS: dict[str, Entry] = {
    "base": Entry(
        "the pretrained model, untouched", "baselines.base:Base", trains=False, matched=False
    ),
    "full": Entry("full fine-tuning with AdamW", "baselines.full:Full", matched=False),
    "lora": Entry(
        "LoRA as peft ships it",
        "baselines.lora:Lora",
        {"alpha_over_rank": 2.0, "dropout": 0.0},
    ),
    "spiel": Entry(
        "SpIEL-AG: sparse deltas, grown by accumulated gradients",
        "spiel.method:Spiel",
        {
            "growth": "ag",
            "reselection_steps": 20,
            "selection_accumulation_steps": 5,
            "initial_reselection_rate": 0.2,
            "reselection_rate_policy": "linear",
        },
    ),
}
