"""Records -> the numbers of the table. Knows records and nothing else."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from suites import stats
from suites.record import Record, TaskScore
from suites.sources import ROLES
from suites.values import given

BASELINE = "lora"
PHASES = ("load", "prepare", "train", "evaluate")


class MixedRecordsError(ValueError):
    """Records that do not belong in one table; the message names them."""


def require_comparable(records: Sequence[Record]) -> None:
    """Raises MixedRecordsError unless all are of one suite hash and world, learned the same from
    the same model, and each method's trained as many weights.
    """
    require_one("suite hash", records, lambda record: record.suite_hash)
    measured = [record for record in records if record.status == "ok"]
    require_one("embedded world", measured, lambda record: record.world)
    for name in ("model weights", "training data"):
        known = [record for record in measured if name in record.loaded]
        require_one(name, known, lambda record, name=name: record.loaded[name])  # type: ignore[misc]
    sized = [record for record in measured if record.size is not None]
    for method in dict.fromkeys(record.method_name for record in sized):
        own = [record for record in sized if record.method_name == method]
        require_one("numbers of trained weights", own, lambda each: given(each.size).num_trainable)
        require_one(
            "dtypes of what is trained", own, lambda each: given(each.size).trainable_dtypes
        )


def hardware(records: Iterable[Record]) -> set[str]:
    """Of those that are ok; what took time or memory is compared on one alone."""
    return {given(each.environment).hardware for each in records if each.status == "ok"}


def require_one(
    what: str,
    records: Iterable[Record],
    key: Callable[[Record], Any],
    named: Callable[[Record], str] = lambda record: f"{record.method_name} seed {record.seed}",
) -> None:
    """Raises MixedRecordsError, with each record `named`, unless `key` is the same for all."""
    groups = grouped((key(record), named(record)) for record in records)
    if len(groups) > 1:
        listed = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
        raise MixedRecordsError(
            f"records of different {what} do not share a table ({listed}); --force runs them again"
        )


def grouped(pairs: Iterable[tuple[Any, str]]) -> dict[Any, list[str]]:
    """The first of each pair -> the seconds that come with it, each once, in order."""
    groups: dict[Any, dict[str, None]] = {}  # as sets, but in order
    for key, name in pairs:
        groups.setdefault(key, {})[name] = None
    return {key: list(names) for key, names in groups.items()}


def frame(records: Sequence[Record], planned: Mapping[str, int] | None = None) -> pd.DataFrame:
    """One row a method; plain numbers, bytes and seconds; of several kinds of hardware no costs.

    `planned` is how many seeds each method was to have, in the order of the rows; those that the
    `records` are of if None. Raises MixedRecordsError for records that do not belong together.
    """
    require_comparable(records)
    planned = planned or Counter(record.method_name for record in records)
    base = [
        record for record in records if record.method_name == BASELINE and record.status == "ok"
    ]
    timed = records if len(hardware(records)) == 1 else []
    base_seconds = by_seed(timed, BASELINE, step_seconds)
    rows = []
    for method, num_seeds in planned.items():
        own = [record for record in records if record.method_name == method]
        ok = [record for record in own if record.status == "ok"]
        row = {"method": method, "num_seeds": num_seeds, "num_ok": len(ok)}
        row["failures"] = [
            f"seed {record.seed} {record.status}: {record.reason}"
            for record in own
            if record.status != "ok"
        ]
        row |= _quality(ok) | _cost(ok if timed else [])
        row |= _sizes(ok, "optimizer_state_bytes", "artifact_bytes") | compared(ok, base)
        seconds = by_seed(timed, method, step_seconds)
        row |= columns("step_seconds", list(seconds.values()))
        ratio = stats.paired_ratio(seconds, base_seconds)
        row[f"step_ratio_to_{BASELINE}"] = ratio.mean if ratio else None
        half_width = ratio.half_width if ratio and method != BASELINE else None
        row[f"step_ratio_to_{BASELINE}_ci95"] = half_width
        rows.append(row)
    return pd.DataFrame(rows)


def step_seconds(record: Record) -> float | None:
    """Mean seconds of a step without the first, which also pays for what happens only once.

    The mean and not the median: work that a method does every so many steps is charged to it.
    """
    seconds = record.training.step_seconds
    return statistics.fmean(seconds[1:] or seconds) if seconds else None


def tokens_per_second(record: Record) -> float | None:
    """Tokens that are no padding, by the time of train steps alone."""
    seconds, num_steps = step_seconds(record), len(record.training.step_seconds)
    return record.training.num_tokens / num_steps / seconds if seconds else None


def train_peak_bytes(record: Record) -> int | None:
    """The most memory that training took: allocated on a GPU, resident on a CPU."""
    return record.phases["train"].peak_bytes if "train" in record.phases else None


def by_seed(
    records: Iterable[Record], method: str, of: Callable[[Record], float | None]
) -> dict[int, float]:
    """Seed -> what `of` says of the method's record, where that is ok and says something."""
    return {
        record.seed: value
        for record in records
        if record.method_name == method
        and record.status == "ok"
        and (value := of(record)) is not None
    }


def _quality(ok: Sequence[Record]) -> dict[str, Any]:
    names = ("num_trainable", "trainable_percent", "num_asked", "lr", "weight_decay", "backend")
    row: dict[str, Any] = {"matched": False, **dict.fromkeys(names)}
    if ok:
        size, tuning = given(ok[0].size), ok[0].tuning or {}
        row |= {
            "num_trainable": size.num_trainable,
            "trainable_percent": 100 * size.num_trainable / size.num_weights,
            "num_asked": size.num_asked,
            "matched": size.matched,
            "lr": tuning.get("lr"),
            "weight_decay": tuning.get("weight_decay"),
            "backend": ok[0].backend,
        }
    for role in ROLES:
        row |= _scores(role, role_means(ok, role), ok)
    return row


def _scores(name: str, values: Sequence[float], ok: Sequence[Record]) -> dict[str, float | None]:
    """As `columns`; without an interval where nothing was trained: then no seed decided."""
    row = columns(name, values)
    return row | {f"{name}_ci95": None} if ok and ok[0].tuning is None else row


def compared(own: Sequence[Record], base: Sequence[Record]) -> dict[str, float | None]:
    """For each role the columns of `stats.paired_difference` of a method from the baseline."""
    row: dict[str, float | None] = {}
    for role in ROLES:
        row |= _compared(f"{role}_minus_{BASELINE}", own, base, role)
    return row


def _compared(
    name: str, own: Sequence[Record], base: Sequence[Record], role: str, task: str | None = None
) -> dict[str, float | None]:
    is_base = bool(own) and own[0].method_name == BASELINE
    arrays, weights = ([], []) if is_base else item_differences(own, base, role, task)
    found = stats.paired_difference(arrays, weights) if arrays else None
    # Of one seed it would be too narrow.
    is_told = found is not None and found.p_value is not None
    return {
        name: found.mean if found else None,
        f"{name}_low": found.low if found and is_told else None,
        f"{name}_high": found.high if found and is_told else None,
        f"{name}_p": found.p_value if found else None,
    }


def tasks(records: Sequence[Record]) -> pd.DataFrame:
    """One row a task and method: what it scored, and its difference from the baseline.

    Raises MixedRecordsError for records that do not belong together.
    """
    require_comparable(records)
    ok = [record for record in records if record.status == "ok"]
    base = [record for record in ok if record.method_name == BASELINE]
    named = {name: score for record in ok for name, score in record.scores.items()}
    rows = []
    for name, score in named.items():
        for method in dict.fromkeys(record.method_name for record in ok):
            own = [each for each in ok if each.method_name == method and name in each.scores]
            row: dict[str, Any] = {"task": name, "role": score.role, "metric": score.metric}
            row |= {"method": method, "num_seeds": len(own), "num_items": score.num_items}
            row |= _scores("score", [each.scores[name].value for each in own], own)
            rows.append(row | _compared(f"minus_{BASELINE}", own, base, score.role, name))
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["task", "role"])


def item_differences(
    own: Sequence[Record], base: Sequence[Record], role: str, task: str | None = None
) -> tuple[list[np.ndarray], list[float]]:
    """`own` - `base`, item by item: arrays (shared seeds, items), and what each weighs.

    Each task of `role`, or `task` alone, is one array of weight 1, or if its subtasks count alike
    one for each of them, among which that weight is shared: so the mean of the arrays is the
    difference of the values.
    Raises MixedRecordsError if the items are not the same.
    """
    theirs = {record.seed: record for record in base}
    pairs = [(record, theirs[record.seed]) for record in own if record.seed in theirs]
    arrays: list[np.ndarray] = []
    weights: list[float] = []
    if not pairs:
        return arrays, weights
    if len({frozenset(record.scores) for pair in pairs for record in pair}) > 1:
        raise MixedRecordsError("records of different tasks do not share a table")
    of_role = [name for name, score in pairs[0][0].scores.items() if score.role == role]
    for name in of_role if task is None else [task]:
        whole = np.stack([_difference(name, a, b) for a, b in pairs])
        parts = np.split(whole, _ends(pairs[0][0].scores[name]), axis=1)
        arrays += parts
        weights += [1 / len(parts)] * len(parts)
    return arrays, weights


def _difference(task: str, one: Record, other: Record) -> np.ndarray:
    own, base = one.scores[task], other.scores[task]
    known = own.items_hash and base.items_hash
    is_other = own.doc_ids != base.doc_ids or own.subtasks != base.subtasks
    if is_other or (known and own.items_hash != base.items_hash):
        raise MixedRecordsError(
            f"records of different test items do not share a table ({task}: {one.method_name} "
            f"seed {one.seed} of {one.started_at}, {other.method_name} seed {other.seed} of "
            f"{other.started_at})"
        )
    return np.subtract(own.per_item, base.per_item)


def _ends(score: TaskScore) -> list[int]:
    """Where in the items each subtask but the last ends, if they count alike; else none does."""
    if score.weighs_by_size:
        return []
    return list(itertools.accumulate(score.subtasks.values()))[:-1]


def role_means(records: Iterable[Record], role: str) -> list[float]:
    """Each record's mean over its tasks of `role`; records without such a task give none."""
    return [
        statistics.fmean(score.value for score in scores)
        for record in records
        if (scores := record.scores_of(role))
    ]


def _cost(ok: Sequence[Record]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for phase in PHASES:
        costs = [record.phases[phase] for record in ok if phase in record.phases]
        row[f"{phase}_seconds"] = mean(cost.seconds for cost in costs)
        row[f"{phase}_peak_bytes"] = mean(cost.peak_bytes for cost in costs)
    row["callback_seconds_per_step"] = mean(mean(record.training.callback_seconds) for record in ok)
    row["tokens_per_second"] = mean(tokens_per_second(record) for record in ok)
    row["first_step_flops"] = mean(record.training.first_step_flops for record in ok)
    return row | _sizes(ok, "saved_for_backward_bytes")


def _sizes(ok: Sequence[Record], *names: str) -> dict[str, Any]:
    return {name: mean(getattr(record.size, name) for record in ok) for name in names}


def columns(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """A column of the mean and one of the half-width of its 95 % interval, None where unknown."""
    if not values:
        return {name: None, f"{name}_ci95": None}
    found = stats.estimate(values)
    return {name: found.mean, f"{name}_ci95": found.half_width}


def mean(values: Iterable[float | None]) -> float | None:
    """Of those that are known; None if none is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
