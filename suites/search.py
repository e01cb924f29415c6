"""The curves of a search: each method's grid on the dev split, and the tuning it picks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from suites import stats
from suites.plan import Cell, records_folder, safe_name
from suites.record import Record, write_whole
from suites.report import ROLES, MixedRecordsError, columns, require_comparable, role_means
from suites.suite import Suite, Tuning
from suites.table import drawn, load, make_console, say, spread


def present(cells: Sequence[Cell], out: Path) -> int:
    """Prints and writes the curves of `cells`; 0 if all of them are ok and comparable, else 1."""
    console = make_console()
    records, problems = load(cells, out)
    for problem in problems:
        say(console, f"not counted: {problem}")
    failed = [record for record in records if record.status != "ok"]
    for record in failed:
        tuning = f"lr {record.tuning['lr']:g} seed {record.seed}"
        say(console, f"{record.method_name} {tuning} {record.status}: {record.reason}")
    try:
        require_comparable(records)
    except MixedRecordsError as error:
        say(console, f"no curves: {error}")
        return 1
    found = curves([record for record in records if record.status == "ok"])
    if found.empty:
        return 1
    suite = cells[0].suite
    console.print(drawn(f"{suite.name}: grids on dev", words(found)))
    say(console, f"records: {records_folder(suite, out, 'dev')}")
    paths = write(found, suite, out)
    say(console, f"grids:   {', '.join(str(path) for path in paths)}")
    return 1 if problems or failed else 0


def write(found: pd.DataFrame, suite: Suite, out: Path) -> list[Path]:
    """Writes the curves as CSV and Markdown, and as a figure where matplotlib is installed."""
    stem = safe_name(suite.name)
    csv, markdown = (out / "grids" / f"{stem}.{ending}" for ending in ("csv", "md"))
    write_whole(found.to_csv(index=False), csv)
    title = f"# {suite.name}: grids on dev\n\n"
    table = words(found).to_markdown(index=False, disable_numparse=True)
    write_whole(f"{title}{table}\n", markdown)
    if find_spec("matplotlib") is None:
        return [csv, markdown]
    figure = out / "figures" / f"{stem}-grid.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(found, suite.name, figure)
    return [csv, markdown, figure]


def draw(found: pd.DataFrame, name: str, path: Path) -> None:
    """A panel a role: each method's dev score by learning rate, its pick marked with a ring."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(ROLES), sharex=True)
    for panel, role in zip(panels, ROLES, strict=True):
        for method, own in found.sort_values("lr").groupby("method", sort=False):
            errors = own[f"{role}_ci95"].astype(float).fillna(0.0)
            values = own[role].astype(float)
            line = panel.errorbar(own["lr"], values, errors, marker=".", capsize=2, label=method)
            picked = own[own["picked"]]
            panel.plot(
                picked["lr"], picked[role], "o", ms=12, mfc="none", color=line[0].get_color()
            )
        panel.set(xscale="log", xlabel="learning rate", ylabel=f"{role} on dev")
    panels[0].legend()
    figure.suptitle(f"{name}: mean over seeds, 95 % interval; ring: picked")
    figure.savefig(path, dpi=150)


def picks(cells: Sequence[Cell], out: Path) -> dict[str, Tuning]:
    """Method -> the tuning that its trials `cells` pick; a method without a good trial has none."""
    records, _ = load(cells, out)
    found = curves([record for record in records if record.status == "ok"])
    return {
        row["method"]: Tuning(row["lr"], row["weight_decay"])
        for row in found.to_dict("records")
        if row["picked"]
    }


def curves(records: Sequence[Record]) -> pd.DataFrame:
    """One row a method and tuning: target and retention over the seeds, and whether it is picked.

    Picked is the smallest learning rate whose mean target is within one standard error of the
    method's best (the one-standard-error rule: Breiman et al., 1984, section 3.4.3): of values
    that dev cannot tell apart, the one that changes the model least. `at_edge` says that the
    method's grid of learning rates ends there, so that a better one may lie outside.
    """
    groups: dict[tuple[str, float, float], list[Record]] = {}
    for record in records:
        key = (record.method_name, record.tuning["lr"], record.tuning["weight_decay"])
        groups.setdefault(key, []).append(record)
    rows: list[dict[str, Any]] = [
        {"method": method, "lr": lr, "weight_decay": weight_decay, "num_seeds": len(own)}
        | columns("target", role_means(own, "target"))
        | {"target_se": stats.estimate(role_means(own, "target")).standard_error}
        | columns("retention", role_means(own, "retention"))
        for (method, lr, weight_decay), own in groups.items()
    ]
    return pd.DataFrame([row | verdict(row, rows) for row in rows])


def verdict(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Whether `row` is its method's pick, and whether it lies at an edge of its grid."""
    own = [other for other in rows if other["method"] == row["method"]]
    rates = [other["lr"] for other in own]
    return {
        "picked": row is pick(own),
        "at_edge": row["lr"] in (min(rates), max(rates)),
    }


def pick(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one method's rows the one to train with."""
    best = max(rows, key=lambda row: row["target"])
    floor = best["target"] - (best["target_se"] or 0.0)
    close = [row for row in rows if row["target"] >= floor]
    return min(close, key=lambda row: (row["lr"], -row["target"]))


def words(found: pd.DataFrame) -> pd.DataFrame:
    """The curves as printed."""
    marks = {(True, True): "picked, at edge", (True, False): "picked"}
    return pd.DataFrame(
        {
            "method": row["method"],
            "lr": f"{row['lr']:g}",
            "decay": f"{row['weight_decay']:g}",
            "seeds": str(row["num_seeds"]),
            "dev target ± 95 %": spread(row, "target", ".3f"),
            "dev retention ± 95 %": spread(row, "retention", ".3f"),
            "": marks.get((row["picked"], row["at_edge"]), ""),
        }
        for row in found.to_dict("records")
    )
