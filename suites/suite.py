"""What a suite is: frozen values, checked when made, hashed to decide what may share a table.

Nothing here imports torch: `--help` and `--list` read suites and must answer at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from suites.budget import Budget
from suites.sources import RANDOM_TOKENS, SPLITS, DataSource, ModelSource, Task
from suites.values import added, hashed_values, require, require_finite, short_hash
from suites.world import World

#: A path that starts so lies in the folder that the suite's embedded world was written to.
WORLD = "{world}"


#: Learning rate schedules of transformers that need no more than a recipe has.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)


@dataclass(frozen=True)
class Recipe:
    """How every method of a suite is trained: what is here is the same for all of them."""

    num_steps: int
    batch_size: int
    gradient_accumulation_steps: int = 1
    lr_scheduler_type: str = "linear"
    warmup_ratio: float = 0.03
    max_grad_norm: float = 0.0
    #: Activations are computed again in the backward pass instead of being kept.
    gradient_checkpointing: bool = added(False)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            require(value > 0, f"{name} must be positive, got {value}")
        require(
            self.lr_scheduler_type in SCHEDULES,
            f"lr_scheduler_type {self.lr_scheduler_type!r} is not one of {', '.join(SCHEDULES)}",
        )
        require(0 <= self.warmup_ratio < 1, f"warmup_ratio {self.warmup_ratio} is not in [0, 1)")
        require_finite("max_grad_norm", self.max_grad_norm)


@dataclass(frozen=True)
class Tuning:
    """The optimiser's values for one method, found by the suite's grid on the dev split."""

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr must be positive, got {self.lr}")
        require_finite("lr", self.lr)
        require_finite("weight_decay", self.weight_decay)


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
    #: Tasks that run code the model wrote are part of the suite only if this is set.
    allow_code_execution: bool = added(False)
    #: "cpu" or "cuda:N"; None is the first GPU where there is one.
    device: str | None = added(None)
    #: What it takes without a GPU ("a cell takes hours"), said before it starts there.
    cpu_note: str = ""

    def __post_init__(self) -> None:
        targets = [task for task in self.tasks if task.role == "target"]
        require(
            bool(targets) or (not self.tasks and self.data.path == RANDOM_TOKENS),
            f"{self.name}: no target task",
        )
        for method, tuning in self.tunings.items():
            _require_tuning(f"{self.name}: tunings[{method!r}]", tuning)
        for method, grid in self.grids.items():
            for number, tuning in enumerate(grid):
                _require_tuning(f"{self.name}: grids[{method!r}][{number}]", tuning)
        for split in SPLITS:
            names = [task.name for task in self.tasks if task.split == split]
            require(len(set(names)) == len(names), f"{self.name}: a {split} task stands twice")
        require(len(self.seeds) > 0, f"{self.name}: no seeds")
        require(
            all(type(seed) is int and 0 <= seed < 2**32 for seed in self.seeds)
            and len(set(self.seeds)) == len(self.seeds),
            f"{self.name}: seeds are {self.seeds}; allowed: whole numbers from 0 to 2**32 - 1, "
            "each once",
        )
        require(self.limit is None or self.limit > 0, f"limit must be positive, got {self.limit}")
        require(
            self.device is None or re.fullmatch(r"cpu|cuda:\d+", self.device) is not None,
            f"device {self.device!r} is not one of cpu, cuda:N",
        )
        require(
            self.eval_batch_size > 0,
            f"eval_batch_size must be positive, got {self.eval_batch_size}",
        )

    def tasks_of(self, split: str) -> tuple[Task, ...]:
        """The tasks that judge a run on `split`; none that runs code unless that is allowed."""
        allowed = [task for task in self.tasks if self.allow_code_execution or not task.runs_code]
        return tuple(task for task in allowed if task.split == split)

    def to_dict(self) -> dict[str, Any]:
        """The suite as plain JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @cached_property
    def hash(self) -> str:
        """What two records must share to stand in one table: all but seeds, tunings and grids.

        Seeds and tunings are the cells' own, so a suite with one more method or seed still
        compares with what was measured before.
        """
        values = hashed_values(self)
        for name in ("seeds", "tunings", "grids", "description", "cpu_note"):
            del values[name]
        return short_hash(values)


def _require_tuning(what: str, value: Any) -> None:
    allowed = "a Tuning, as Tuning(lr=1e-4, weight_decay=0.0)"
    require(isinstance(value, Tuning), f"{what} is {value!r}; allowed: {allowed}")


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
