"""What a search found: a row for each tuning of each method, and which one is picked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pandas as pd

from suites import stats
from suites.plan import Cell
from suites.record import Record
from suites.report import columns, role_means
from suites.values import given


def curves(records: Sequence[Record], left: Collection[str] = ()) -> pd.DataFrame:
    """One row a method and tuning: target and retention over the seeds, and whether it is picked.

    Picked is the smallest learning rate whose mean target is within one standard error of the
    method's best (the one-standard-error rule: Breiman et al., 1984, section 3.4.3): of values
    that dev cannot tell apart, the one that changes the model least. Only tunings that are ok with
    every seed are eligible, as a mean over the seeds that happened not to diverge flatters; of the
    methods in `left` nothing is picked. `at_edge` says that the method's grid of learning rates
    ends there, so that a better one may lie outside.
    """
    groups: dict[tuple[str, float, float], list[Record]] = {}
    for record in records:
        tuning = given(record.tuning)
        key = (record.method_name, tuning["lr"], tuning["weight_decay"])
        groups.setdefault(key, []).append(record)
    rows = [
        {"method": method, "lr": lr, "weight_decay": weight_decay} | outcome(own)
        for (method, lr, weight_decay), own in groups.items()
    ]
    bounds = {
        (method, lr)
        for (method, lr, _), own in groups.items()
        if all(record.status in ("ok", "diverged") for record in own)
    }
    return pd.DataFrame([row | verdict(row, rows, left, bounds) for row in rows])


def outcome(records: Sequence[Record]) -> dict[str, Any]:
    """What one tuning reached with its seeds, by those that are ok."""
    ok = [record for record in records if record.status == "ok"]
    targets = role_means(ok, "target")
    return {
        "num_seeds": len(records),
        "num_ok": len(ok),
        **columns("target", targets),
        "target_se": stats.estimate(targets).standard_error if targets else None,
        **columns("retention", role_means(ok, "retention")),
    }


def verdict(
    row: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    left: Collection[str],
    bounds: Collection[tuple[str, float]],
) -> dict[str, bool]:
    """Whether `row` is its method's pick, and whether it lies at an edge of its grid, of which
    `bounds` has the methods and rates that say what training comes to, be it that it diverges.
    """
    own = [other for other in rows if other["method"] == row["method"]]
    rates = [row["lr"], *(o["lr"] for o in own if (o["method"], o["lr"]) in bounds)]
    return {
        "picked": row["method"] not in left and row is pick(own),
        "at_edge": row["lr"] in (min(rates), max(rates)),
    }


def pick(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Of one method's rows the one to train with; None if none is eligible."""
    rows = [row for row in rows if eligible(row)]
    if not rows:
        return None
    best = max(rows, key=lambda row: row["target"])
    floor = best["target"] - (best["target_se"] or 0.0)
    close = [row for row in rows if row["target"] >= floor]
    return min(close, key=lambda row: (row["lr"], -row["target"]))


def eligible(found: Any) -> Any:
    """Whether a row is ok with every seed; of a frame, for each of its rows."""
    return found["num_ok"] == found["num_seeds"]


def not_done(cells: Sequence[Cell], records: Sequence[Record]) -> Mapping[str, int]:
    """Method -> how many of its trials `cells` have no outcome among `records`, if any."""
    done = {record.cell_hash for record in records if record.status != "interrupted"}
    return Counter(cell.method for cell in cells if cell.hash not in done)
