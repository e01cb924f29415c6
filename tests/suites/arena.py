"""A suite small enough for tests, methods that go wrong, and records made by hand.

`python -m tests.suites.arena` is the command with that suite and those methods in its tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from suites import catalog, embedded, methods, record
from suites.plan import Cell
from suites.provenance import Environment
from suites.suite import Budget, Recipe, Suite, Tuning
from tests.conftest import TINY

TRAINED = ("full", "lora", "spiel", "raising", "dying", "diverging")


def small_suite(**changes: Any) -> Suite:
    tuning = Tuning(lr=1e-3)
    values = {
        "name": "small",
        "recipe": Recipe(num_steps=3, batch_size=4),
        "budget": Budget(2, catalog.LLAMA_PROJECTIONS),
        "world": TINY,
        "tunings": dict.fromkeys(TRAINED, tuning),
        "grids": dict.fromkeys(("full", "lora"), (Tuning(1e-4), Tuning(1e-3))),
        "seeds": (0, 1),
    }
    return dataclasses.replace(catalog.quickstart(), **{**values, **changes})


@dataclass(frozen=True)
class Raising:
    """Fails in its own code."""

    def prepare(self, model: Any, budget: Any, total_steps: int) -> Any:
        raise RuntimeError("no such luck")


@dataclass(frozen=True)
class Dying:
    """Is killed from outside while it prepares."""

    def prepare(self, model: Any, budget: Any, total_steps: int) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


@dataclass(frozen=True)
class Diverging:
    """Trains on weights that are not finite."""

    def prepare(self, model: Any, budget: Any, total_steps: int) -> Any:
        import torch

        from baselines.full import Full

        with torch.no_grad():
            model.lm_head.weight.fill_(float("nan"))
        return Full().prepare(model, budget, total_steps)


BROKEN = {
    name: methods.Entry(
        f"for tests: {name}", f"tests.suites.arena:{name.capitalize()}", matched=False
    )
    for name in ("raising", "dying", "diverging")
}


def cell(method: str = "lora", seed: int = 0, suite: Suite | None = None, **changes: Any) -> Cell:
    suite = suite or small_suite()
    entry = {**methods.METHODS, **BROKEN}[method]
    return Cell(suite, method, entry, suite.tunings.get(method), seed, **changes)


def still_running(family: list[psutil.Process], seconds: float = 60) -> list[psutil.Process]:
    """Those of `family` that have not ended after so long; a container may leave zombies."""
    deadline = time.monotonic() + seconds
    while (left := [each for each in family if _runs(each)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


ENVIRONMENT = Environment(
    git_revision="0123456789abcdef",
    git_dirty=False,
    packages={"torch": "2.13.0"},
    python="3.11.7",
    platform="Linux",
    cpu="A CPU",
    num_cpus=2,
    num_threads=2,
    gpus=(),
    device="cpu",
    code_hash="c0de",
)


def finished(
    of: Cell,
    target: float = 0.5,
    retention: float = 0.9,
    seconds: float = 0.1,
    num_trainable: int = 100,
    **changes: Any,
) -> record.Record:
    """A record of `of` as a good run leaves it, with the figures given."""

    def score(role: str, value: float) -> record.TaskScore:
        return record.TaskScore(value, "acc,none", role, of.split, 2, (1.0, 0.0), (0, 1))

    asked = 100 if of.entry.matched else None
    steps = (9.0, seconds, seconds)  # the first step pays for what happens once
    parts = {
        "environment": ENVIRONMENT,
        "size": record.Size(
            1000, num_trainable, asked, num_trainable == asked, ("float32",), *[2**20] * 3
        ),
        "training": record.Training((1.0, 0.9, 0.8), steps, (0.01, 0.01, 0.01), 30, 10, 0),
        "phases": {"load": record.PhaseCost(1.0, 2**20), "train": record.PhaseCost(2.0, 2**21)},
        "scores": {"t": score("target", target), "r": score("retention", retention)},
        "world": of.suite.world and embedded.name_of(of.suite.world),
    }
    return record.Record.of(of, "ok", "", record.now(), **{**parts, **changes})


def write_all(records: list[record.Record], cells: list[Cell], out: Path) -> None:
    for each, of in zip(records, cells, strict=True):
        record.write(each, of.record_path(out))


def row_of(frame: pd.DataFrame, method: str) -> pd.Series:
    return frame[frame["method"] == method].iloc[0]


if __name__ == "__main__":
    from suites.run import main

    catalog.SUITES["small"] = small_suite()
    methods.METHODS.update(BROKEN)
    sys.exit(main())
