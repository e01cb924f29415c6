"""World: every constant that makes an embedded world; `suites.embedded` makes it of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

#: Called with the fraction done, in [0, 1], and a few words on what is being done.
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class World:
    """Every constant that makes an embedded world; equal worlds are equal files."""

    seed: int = 0
    # Facts.
    num_entities: int = 800
    num_clusters: int = 32
    num_relations: int = 8
    num_changed_relations: int = 4
    num_values: int = 96
    num_choices: int = 8
    shown_fraction: float = 0.4
    #: Asked in each task of each split.
    num_questions: int = 960
    # The base model, a Llama.
    hidden_size: int = 128
    intermediate_size: int = 336
    num_layers: int = 4
    num_heads: int = 4
    initializer_range: float = 0.05
    # Its pretraining: AdamW, cosine schedule; a batch is of entities, with all their relations.
    pretraining_steps: int = 300
    pretraining_batch_size: int = 64
    pretraining_lr: float = 2e-3
    pretraining_weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "seed" and value <= 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
        if not self.shown_fraction < 1:
            raise ValueError(f"shown_fraction {self.shown_fraction} is not below 1")
        self._at_most("num_changed_relations", "num_relations", less=1)
        self._at_most("num_clusters", "num_values")
        self._at_most("num_choices", "num_clusters", less=1)
        if round(self.shown_fraction * (self.num_entities // self.num_clusters)) < 1:
            raise ValueError(
                f"shown_fraction {self.shown_fraction} of {self.num_entities} entities in "
                f"{self.num_clusters} clusters shows none of a cluster"
            )
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of twice "
                f"num_heads {self.num_heads}"
            )

    def _at_most(self, name: str, bound: str, less: int = 0) -> None:
        allowed = getattr(self, bound) - less
        if getattr(self, name) > allowed:
            why = f"{bound} - {less}" if less else bound
            raise ValueError(f"{name} is {getattr(self, name)}, allowed: up to {allowed} ({why})")
