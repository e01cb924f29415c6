"""What is to be done: a suite becomes cells, each with its own file."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suites.inputs import fingerprint
from suites.methods import PEFT, Entry, entry_of
from suites.suite import WORLD, Suite, Tuning
from suites.values import short_hash


@dataclass(frozen=True)
class Execution:
    """How cells are run; nothing here changes what they result in."""

    #: Data-parallel processes that train one cell.
    num_processes: int = 1
    #: Seconds of training between checkpoints; None writes none.
    save_seconds: float | None = 600.0
    #: Whether finished cells are run again.
    force: bool = False
    #: Whether what was trained is kept; never of a search's trials.
    keep_artifacts: bool = False


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation: what a child process is given, and a record is about."""

    suite: Suite
    method: str
    entry: Entry
    #: None for a method that does not train.
    tuning: Tuning | None
    seed: int
    #: Which of the suite's tasks judge it: `dev` while searching, `test` otherwise.
    split: str = "test"

    @property
    def hash(self) -> str:
        """Two cells of one hash are the same work, so the second need not be done."""
        tuning = None if self.tuning is None else dataclasses.asdict(self.tuning)
        entry = dataclasses.asdict(self.entry)
        del entry["description"]
        values = [self.suite.hash, self.method, entry, tuning, self.seed, self.split]
        local = fingerprint(self.suite)
        return short_hash([*values, local] if local else values)

    @property
    def name(self) -> str:
        """`lora-r8-s0`; with a tuning that is not the suite's own, `lora-r8-lr0.001-wd0-s0`."""
        is_own = self.split == "test" and self.tuning == self.suite.tunings.get(self.method)
        return self._named(with_tuning=not is_own)

    def _named(self, with_tuning: bool) -> str:
        parts = [self.method, self.suite.budget.label]
        if self.tuning is not None and with_tuning:
            parts += [f"lr{self.tuning.lr:g}", f"wd{self.tuning.weight_decay:g}"]
        return safe_name("-".join([*parts, f"s{self.seed}"]))

    def record_path(self, out: Path) -> Path:
        """The cell's file in the results folder `out`."""
        return records_folder(self.suite, out, self.split) / f"{self.name}.json"

    def found_path(self, out: Path) -> Path:
        """Where the cell's file is, if there is one: a search that picked the tuning, before it
        became the suite's own, left it under another name.
        """
        own = self.record_path(out)
        picked = own.with_name(f"{self._named(with_tuning=True)}.json")
        return picked if picked.exists() and not own.exists() else own

    def log_path(self, out: Path) -> Path:
        """Where what the cell prints is kept."""
        folder = out / "logs" / safe_name(self.suite.name)
        return folder / ("search" if self.split == "dev" else "") / f"{self.name}.log"

    def lock_path(self, out: Path) -> Path:
        """The file that is locked by the process that works on this cell."""
        return self.log_path(out).with_suffix(".lock")

    def artifact_path(self, out: Path) -> Path:
        """The folder of what a user would keep of this training, where it is kept."""
        return out / "artifacts" / safe_name(self.suite.name) / f"{self.name}-{self.hash}"

    def checkpoints(self, out: Path) -> Path:
        """The folder of the cell's checkpoints, while it is not finished."""
        return out / "checkpoints" / safe_name(self.suite.name) / f"{self.name}-{self.hash}"


#: File systems allow 255 bytes, and names are joined to others and get endings.
LONGEST_NAME = 100


def records_folder(suite: Suite, out: Path, split: str = "test") -> Path:
    """`<out>/records/<suite>/<model>`; a search's trials lie in `search` inside it."""
    model = "world" if suite.model.path.startswith(WORLD) else suite.model.path
    folder = out / "records" / safe_name(suite.name) / safe_name(model)
    return folder / "search" if split == "dev" else folder


def safe_name(text: str) -> str:
    """`text` as a file name on any file system: `meta-llama/Llama-2` -> `meta-llama--Llama-2`.

    With a hash where it is too long for one, or has letters that another text may differ in.
    """
    name = re.sub(r"[^A-Za-z0-9._+-]+", "--", text).strip("-.")
    if len(name) <= LONGEST_NAME and re.fullmatch(r"[\w ./:,=+-]*", text, re.ASCII):
        return name
    return f"{name[: LONGEST_NAME - 9]}-{short_hash(text)[:8]}"


def plan(
    suite: Suite,
    methods: Sequence[str],
    seeds: Iterable[int],
    tunings: Mapping[str, Tuning] | None = None,
) -> list[Cell]:
    """Every cell, seeds outermost, and each seed's methods begin with another one: a machine that
    slows down slows all methods alike.

    `tunings` are the suite's own if None. Raises ValueError for a method that is unknown or that
    has no learning rate.
    """
    tunings = suite.tunings if tunings is None else tunings
    cells = []
    for turn, seed in enumerate(seeds):
        for method in rotated(methods, turn):
            entry = entry_of(method)
            key = stand_in(method, tunings)
            if entry.trains and key not in tunings:
                raise ValueError(_lacks(suite, "learning rate", method, tunings))
            cells.append(Cell(suite, method, entry, tunings[key] if entry.trains else None, seed))
    return cells


#: Forms of a method, which take its rates; of the floor nothing is trained, so any will do.
FORM_OF = {
    **dict.fromkeys(("lora-bf16", "lora-dropout", "lora-paper", "frozen"), "lora"),
    "full-bf16": "full",
}


def stand_in(method: str, table: Mapping[str, Any]) -> str:
    """The method whose learning rates `method` takes: LoRA's for one of peft's that has none."""
    if method in table:
        return method
    return "lora" if method.startswith(PEFT) else FORM_OF.get(method, method)


def plan_search(suite: Suite, methods: Sequence[str], seeds: Iterable[int]) -> list[Cell]:
    """Every trained method at every tuning of its grid, judged on the dev split alone.

    Raises ValueError for a method without a grid, or if the grids give unequal numbers of trials.
    """
    if not any(task.role == "target" for task in suite.tasks_of("dev")):
        raise ValueError(f"{suite.name} has no target task on the dev split to search with")
    trained = [name for name in methods if entry_of(name).trains]
    if not trained:
        raise ValueError(f"nothing to search: {', '.join(methods)} does not train")
    grids = {name: suite.grids.get(stand_in(name, suite.grids), ()) for name in trained}
    for name, grid in grids.items():
        if not grid:
            raise ValueError(_lacks(suite, "grid", name, suite.grids))
    sizes = {name: len(grid) for name, grid in grids.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the grids differ in their number of trials: {sizes}")
    return [
        Cell(suite, name, entry_of(name), tuning, seed, "dev")
        for turn, seed in enumerate(seeds)
        for name in rotated(trained, turn)
        for tuning in grids[name]
    ]


def rotated(names: Sequence[str], turns: int) -> list[str]:
    """`names` in their order, from the one after the first `turns` on."""
    start = turns % max(1, len(names))
    return [*names[start:], *names[:start]]


def _lacks(suite: Suite, what: str, method: str, table: Mapping[str, Any]) -> str:
    hint = (
        "; --search picks one from its grid"
        if table is suite.tunings and method in suite.grids
        else ""
    )
    others = f"only for {', '.join(table)}" if table else "nor for any other method"
    return f"{suite.name} has no {what} for {method!r}, {others}{hint}"
