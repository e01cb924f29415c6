"""Record: all that is known of one cell, in one JSON file, written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from suites import embedded
from suites.plan import Cell
from suites.provenance import Environment

SCHEMA_VERSION = 4

STATUSES = ("ok", "oom", "diverged", "failed", "interrupted")


class DamagedRecordError(ValueError):
    """A file that is no record of this schema; the message names it and says why."""


@dataclass(frozen=True)
class TaskScore:
    """What one lm-eval task said of the trained model.

    Of a group or tag the items are those of its subtasks, one subtask after the other, and the
    value is the mean over all items where the group says so (as `mmlu`), else the mean of the
    subtasks' values (as `tydiqa_goldp`, whose languages count alike).
    """

    value: float
    metric: str
    role: str
    split: str
    num_items: int
    #: The metric of each item (1.0 or 0.0 for accuracy), in the order of the task's items.
    per_item: tuple[float, ...]
    #: lm-eval's number of each of those items, counted in its subtask.
    doc_ids: tuple[int, ...]
    #: The number of items of each subtask, in their order; of a task that has no others, itself.
    subtasks: Mapping[str, int] = field(default_factory=dict)
    #: Whether `value` is the mean over all items.
    weighs_by_size: bool = True
    #: Of what lm-eval asked and held for right: other data or another prompt have another.
    items_hash: str = ""
    #: Requests (of an item as many as it has answers to choose from) that lost their beginning, as
    #: they were longer than the model has room for.
    num_cut: int = 0


@dataclass(frozen=True)
class PhaseCost:
    """Wall-clock seconds of one phase, and the peak of memory inside it.

    On CUDA the peaks are torch's own; on a CPU `peak_bytes` is what the process held at the peak
    above what it held before the model was loaded, so that imported libraries do not count.
    """

    seconds: float
    peak_bytes: int | None
    peak_reserved_bytes: int | None = None


@dataclass(frozen=True)
class Training:
    """The train steps: their losses and their time, with what the method's callbacks took of it."""

    losses: tuple[float, ...] = ()
    step_seconds: tuple[float, ...] = ()
    callback_seconds: tuple[float, ...] = ()
    num_tokens: int = 0
    num_examples: int = 0
    #: Examples left out because nothing of their completion fits in max_length.
    num_dropped: int = 0
    #: Examples cut at max_length and kept.
    num_truncated: int = 0
    #: Floating-point operations of the first step, as torch's counter sees them; None where it
    #: cannot. It knows nothing of operations by kernels of our own.
    first_step_flops: int | None = None
    #: The steps at which it went on from a checkpoint.
    resumed_at: tuple[int, ...] = ()
    #: What the product of `suites.yardstick` took before and after the steps (of the last sitting,
    #: if there were several).
    yardstick_seconds: tuple[float, ...] = ()
    #: The optimizer's class and what it was made with (betas, eps and so on); the learning rate is
    #: that before the schedule.
    optimizer: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Size:
    """How large the trained part is, asked and met, and what it costs to hold and to keep."""

    num_weights: int
    num_trainable: int
    #: None for a method without a size knob.
    num_asked: int | None
    #: Whether `num_trainable` is within 1 % of `num_asked`.
    matched: bool
    #: Of the trained weights.
    trainable_dtypes: tuple[str, ...]
    saved_for_backward_bytes: int | None = None
    optimizer_state_bytes: int | None = None
    artifact_bytes: int | None = None
    #: peft's config of the adapter, with what was solved from the budget; empty without one.
    adapter_config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """One cell's outcome. What a failed cell did not reach is None or empty."""

    suite_name: str
    suite_hash: str
    cell_hash: str
    method_name: str
    seed: int
    split: str
    status: str
    reason: str
    #: The suite, the method's entry and the tuning in full, as plain values.
    suite: Mapping[str, Any]
    method: Mapping[str, Any]
    tuning: Mapping[str, float] | None
    started_at: str
    ended_at: str
    environment: Environment | None = None
    #: The embedded world's key, which also tells the libraries and the code that made it.
    world: str | None = None
    #: Which implementation of its operations the method used, where it has several.
    backend: str | None = None
    size: Size | None = None
    training: Training = field(default_factory=Training)
    phases: Mapping[str, PhaseCost] = field(default_factory=dict)
    scores: Mapping[str, TaskScore] = field(default_factory=dict)
    #: What tells the model and the data from other versions of them, see `suites.cell.contents`.
    loaded: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"status {self.status!r} is not one of {', '.join(STATUSES)}")

    @classmethod
    def of(cls, cell: Cell, status: str, reason: str, started_at: str, **parts: Any) -> Record:
        """The record of `cell`; `parts` are the fields known beyond the cell itself."""
        tuning = None if cell.tuning is None else dataclasses.asdict(cell.tuning)
        return cls(
            suite_name=cell.suite.name,
            suite_hash=cell.suite.hash,
            cell_hash=cell.hash,
            method_name=cell.method,
            seed=cell.seed,
            split=cell.split,
            status=status,
            reason=reason,
            suite=cell.suite.to_dict(),
            method=dataclasses.asdict(cell.entry),
            tuning=tuning,
            started_at=started_at,
            ended_at=now(),
            **parts,
        )

    def scores_of(self, role: str) -> list[TaskScore]:
        return [score for score in self.scores.values() if score.role == role]


def now() -> str:
    """This moment in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(record: Record, path: Path) -> None:
    """Writes `record` to `path` as `write_whole` does; ValueError for what JSON cannot hold.

    A finished record there is kept in the folder `replaced` beside it, if that is of other settings
    or data, or if this one is not ok.
    """
    text = json.dumps(dataclasses.asdict(record), indent=1, allow_nan=False)
    _keep(record, path)
    write_whole(text, path)


def _keep(record: Record, path: Path) -> None:
    with suppress(DamagedRecordError):  # or there is none
        found = read(path)
        is_redone = (found.cell_hash, found.world) == (record.cell_hash, record.world)
        if found.status == "ok" and not (is_redone and record.status == "ok"):
            kept = path.parent / "replaced" / f"{path.stem}-{found.cell_hash}.json"
            write_whole(path.read_text(encoding="utf-8"), kept)


def write_whole(text: str, path: Path) -> None:
    """Writes `text` to `path` whole or, if that fails (OSError), not at all.

    It goes to a file beside it and is on the disk before it takes the name: a reader never sees
    half of it, and a full disk leaves the file that was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read(path: Path) -> Record:
    """The record in `path`; raises DamagedRecordError if it is not a whole one of this schema."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedRecordError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(values, dict) or "schema_version" not in values:
        raise DamagedRecordError(f"{path}: not a record: it has no schema_version")
    found = values["schema_version"]
    if found != SCHEMA_VERSION:
        raise DamagedRecordError(f"{path}: schema {found}, this version reads {SCHEMA_VERSION}")
    try:
        return _from_dict(values)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise DamagedRecordError(f"{path}: {error}") from error


def finishes(found: Record, cell: Cell) -> bool:
    """Whether the record `found` is of `cell`, and ok.

    One of another embedded world, as other libraries make it, could share no table with new ones.
    """
    world = cell.suite.world and embedded.name_of(cell.suite.world)
    return found.status == "ok" and found.cell_hash == cell.hash and found.world == world


def _from_dict(values: dict[str, Any]) -> Record:
    """Rebuilds the nested dataclasses; a missing or unknown field is a TypeError."""
    values = dict(values)
    if values["environment"] is not None:
        values["environment"] = Environment(**_with_tuples(values["environment"]))
    if values["size"] is not None:
        values["size"] = Size(**_with_tuples(values["size"]))
    values["training"] = Training(**_with_tuples(values["training"]))
    values["phases"] = {name: PhaseCost(**phase) for name, phase in values["phases"].items()}
    values["scores"] = {name: _score(score) for name, score in values["scores"].items()}
    return Record(**values)


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, of which JSON knows the tuples as lists only."""
    return {name: tuple(each) if isinstance(each, list) else each for name, each in values.items()}


def _score(values: dict[str, Any]) -> TaskScore:
    """Raises ValueError for one that is no number, or has no item for each of its documents."""
    score = TaskScore(**_with_tuples(values))
    if not all(map(math.isfinite, (score.value, *score.per_item))):
        raise ValueError("a score is not finite")
    if not len(score.per_item) == len(score.doc_ids) == score.num_items:
        raise ValueError(
            f"a score of {score.num_items} items has {len(score.per_item)} values for "
            f"{len(score.doc_ids)} documents"
        )
    return score
