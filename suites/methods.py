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

from suites.values import choose

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback

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
    """A way to fine-tune: a frozen dataclass whose fields are its hyper-parameters.

    One that cannot be trained for a single step has an attribute `min_steps`.
    """

    def prepare(self, model: PreTrainedModel, budget: Budget, total_steps: int) -> Contestant:
        """Makes `model` trainable within `budget`; random choices follow torch's global seed."""
        ...

    def size(self, model: PreTrainedModel, budget: Budget) -> int:
        """What `prepare` would train; `model` may be without values, and stays as it is."""
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


def _lora(
    name: str,
    alpha_over_rank: float = 2.0,
    dropout: float = 0.0,
    in_fp32: bool = True,
    **variant: Any,
) -> dict[str, Any]:
    return {
        "alpha_over_rank": alpha_over_rank,
        "dropout": dropout,
        "name": name,
        "variant": variant,
        "in_fp32": in_fp32,
    }


def _adapter(
    name: str,
    peft_type: str,
    knob: str | None = None,
    seed: str | None = None,
    per_knob: Mapping[str, float] | None = None,
    **config: Any,
) -> dict[str, Any]:
    return {
        "name": name,
        "peft_type": peft_type,
        "config": config,
        "knob": knob,
        "per_knob": per_knob or {},
        "seed": seed,
    }


def _spiel(growth: str) -> dict[str, Any]:
    return {
        "growth": growth,
        "reselection_steps": 20,
        "selection_accumulation_steps": 5,
        "initial_reselection_rate": 0.2,
        "reselection_rate_policy": "linear",
    }


def _super(name: str, low_rank_share: float) -> dict[str, Any]:
    return {
        "name": name,
        "low_rank_share": low_rank_share,
        "select_top": True,
        "alpha_over_rank": 2.0,
    }


LORA, ADAPTER = "baselines.lora:Lora", "baselines.adapter:Adapter"
FULL, SUPER = "baselines.full:Full", "baselines.supertuning:Supertuning"
SPIEL = "spiel.method:Spiel"

METHODS: dict[str, Entry] = {
    "base": Entry(
        "the pretrained model, untouched", "baselines.base:Base", trains=False, matched=False
    ),
    "frozen": Entry(
        "the floor: a step's passes with nothing to train", "baselines.frozen:Frozen", matched=False
    ),
    "full": Entry(
        "full fine-tuning with AdamW, of fp32 weights in mixed precision",
        FULL,
        {"in_fp32": True},
        matched=False,
    ),
    "full-bf16": Entry(
        "full fine-tuning in the model's dtype", FULL, {"in_fp32": False}, matched=False
    ),
    "lora": Entry("LoRA as peft ships it", LORA, _lora("lora")),
    "lora-bf16": Entry(
        "LoRA in the model's dtype, not in fp32", LORA, _lora("lora-bf16", in_fp32=False)
    ),
    "lora-dropout": Entry(
        "LoRA with the SpIEL paper's dropout", LORA, _lora("lora-dropout", dropout=0.1)
    ),
    "lora-paper": Entry(
        "LoRA with the SpIEL paper's dropout and its alpha, 16 whatever the rank",
        LORA,
        _lora("lora-paper", dropout=0.1, lora_alpha=16),
    ),
    "rslora": Entry(
        "LoRA scaled by the root of its rank, alpha 16",
        LORA,
        _lora("rslora", lora_alpha=16, use_rslora=True),
    ),
    "dora": Entry("LoRA of directions, and magnitudes", LORA, _lora("dora", use_dora=True)),
    "pissa": Entry(
        "LoRA that starts as the weights' largest singular vectors",
        LORA,
        _lora("pissa", alpha_over_rank=1.0, init_lora_weights="pissa"),
    ),
    "randlora": Entry(
        "full-rank sums of shared random low-rank bases",
        ADAPTER,
        _adapter("randlora", "RANDLORA", "r", "projection_prng_key", {"randlora_alpha": 20}),
    ),
    "vera": Entry(
        "vectors between shared random matrices, of rank 256",
        ADAPTER,
        _adapter("vera", "VERA", seed="projection_prng_key", r=256),
        matched=False,
    ),
    "miss": Entry("one shared shard of each weight", ADAPTER, _adapter("miss", "MISS", "r")),
    "ia3": Entry(
        "(IA)3: factors of the activations that its paper names",
        ADAPTER,
        _adapter("ia3", "IA3", target_modules=None),
        matched=False,
    ),
    "prefix": Entry(
        "prefix tuning: keys and values of virtual tokens",
        "baselines.prefix:Prefix",
        {"activations": True},
    ),
    "ln_tuning": Entry(
        "the scales of the norms",
        ADAPTER,
        _adapter("ln_tuning", "LN_TUNING", target_modules=None),
        matched=False,
    ),
    "shira": Entry(
        "SHiRA: sparse deltas at random places",
        ADAPTER,
        _adapter("shira", "SHIRA", "r", "random_seed"),
    ),
    "supertuning": Entry("sparse deltas of the largest weights", SUPER, _super("supertuning", 0.0)),
    "supra": Entry(
        "RoSA-like: half sparse deltas of the largest weights, half LoRA",
        SUPER,
        _super("supra", 0.5),
    ),
    "spiel": Entry("SpIEL-AG: sparse deltas, grown by accumulated gradients", SPIEL, _spiel("ag")),
    "spiel-ma": Entry("SpIEL-MA: sparse deltas, grown by SM3's momenta", SPIEL, _spiel("ma")),
}

#: `peft:path/to/adapter_config.json` names a method too.
PEFT = "peft:"


def entry_of(name: str) -> Entry:
    """The entry of METHODS, or of the file that `peft:path/to/adapter_config.json` names.

    What that file says becomes the entry's options, so it is hashed and recorded. Raises
    ValueError for an unknown name, with the nearest methods, and what `peft_config.read` raises of
    the file.
    """
    if not name.startswith(PEFT):
        return choose("method", name, METHODS)
    from suites import peft_config

    path = Path(name.removeprefix(PEFT))
    peft_type, knob, config = peft_config.read(path)
    options = _adapter(name, peft_type, knob) | {"config": config}
    return Entry(f"{peft_type} of peft, as {path} says", ADAPTER, options)
