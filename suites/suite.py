"""What a suite is: frozen values, checked when made, hashed to decide what may share a table.

Nothing here imports torch: `--help` and `--list` read suites and must answer at once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from suites.embedded import World

#: A path that starts so lies in the folder that the suite's embedded world was written to.
WORLD = "{world}"

DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("dev", "test")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from: a hub id or a local folder, and its dtype."""

    path: str
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        _require(self.dtype in DTYPES, f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class DataSource:
    """Training examples: a JSONL file whose rows have `prompt` and `completion` strings."""

    path: str
    max_length: int = 2048

    def __post_init__(self) -> None:
        _require(self.max_length > 0, f"max_length must be positive, got {self.max_length}")


@dataclass(frozen=True)
class Task:
    """One lm-eval task and the metric read from it, by lm-eval's own key (as `acc,none`).

    `role` is what its score says of a method: `target` is what the fine-tuning was for,
    `retention` what the base model could do before.
    """

    name: str
    metric: str
    role: Literal["target", "retention"]
    split: Literal["dev", "test"] = "test"
    num_fewshot: int | None = None

    def __post_init__(self) -> None:
        _require(self.role in ("target", "retention"), f"role {self.role!r} is unknown")
        _require(self.split in SPLITS, f"split {self.split!r} is not one of {', '.join(SPLITS)}")


@dataclass(frozen=True)
class Recipe:
    """How every method of a suite is trained: what is here is the same for all of them."""

    num_steps: int
    batch_size: int
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be positive, got {value}")
        _require(0 <= self.warmup_ratio < 1, f"warmup_ratio {self.warmup_ratio} is not in [0, 1)")


@dataclass(frozen=True)
class Budget:
    """How many weights a method may train: as many as LoRA of `lora_rank` on `target_modules`.

    Methods solve for their own size; the definition by LoRA's rank is that of the SpIEL paper
    (arXiv 2401.16405, section 4.1).
    """

    lora_rank: int
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        _require(self.lora_rank > 0, f"lora_rank must be positive, got {self.lora_rank}")
        _require(len(self.target_modules) > 0, "target_modules is empty")

    @property
    def label(self) -> str:
        return f"r{self.lora_rank}"

    def num_weights(self, model: Any) -> int:
        """Trainable weights this budget allows on `model`: rank x sum(in + out) of its targets."""
        sides = [
            sum(module.weight.shape)
            for name, module in model.named_modules()
            if name.split(".")[-1] in self.target_modules and hasattr(module, "weight")
        ]
        if not sides:
            wanted = ", ".join(self.target_modules)
            raise ValueError(f"the model has none of the targeted modules: {wanted}")
        return self.lora_rank * sum(sides)


@dataclass(frozen=True)
class Tuning:
    """The optimiser's values for one method, found by the suite's grid on the dev split."""

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        _require(self.lr > 0, f"lr must be positive, got {self.lr}")


@dataclass(frozen=True)
class Suite:
    """One comparison: a model, data, a recipe, a budget, and the tasks that judge the result."""

    name: str
    description: str
    model: ModelSource
    data: DataSource
    tasks: tuple[Task, ...]
    recipe: Recipe
    budget: Budget
    tunings: Mapping[str, Tuning]
    grids: Mapping[str, tuple[Tuning, ...]] = field(default_factory=dict)
    world: World | None = None
    task_folder: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    limit: int | None = None
    #: Sequences that lm-eval gives the model at once.
    eval_batch_size: int = 64

    def __post_init__(self) -> None:
        _require(any(task.role == "target" for task in self.tasks), f"{self.name}: no target task")
        _require(len(self.seeds) > 0, f"{self.name}: no seeds")
        _require(self.limit is None or self.limit > 0, f"limit must be positive, got {self.limit}")
        _require(
            self.eval_batch_size > 0,
            f"eval_batch_size must be positive, got {self.eval_batch_size}",
        )

    def tasks_of(self, split: str) -> tuple[Task, ...]:
        return tuple(task for task in self.tasks if task.split == split)

    def to_dict(self) -> dict[str, Any]:
        """The suite as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def hash(self) -> str:
        """What two records must share to stand in one table: all but seeds, tunings and grids.

        Seeds and tunings are the cells' own, so a suite with one more method or seed still
        compares with what was measured before.
        """
        values = self.to_dict()
        for name in ("seeds", "tunings", "grids", "description"):
            del values[name]
        return short_hash(values)


def placed(suite: Suite, world: Path | None) -> Suite:
    """The suite with its `{world}` paths inside the folder `world`; others as they are."""

    def place(path: str) -> str:
        return path.replace(WORLD, str(world)) if path.startswith(WORLD) else path

    return dataclasses.replace(
        suite,
        model=dataclasses.replace(suite.model, path=place(suite.model.path)),
        data=dataclasses.replace(suite.data, path=place(suite.data.path)),
        task_folder=None if suite.task_folder is None else place(suite.task_folder),
    )


def short_hash(values: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of `values` as sorted JSON."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
