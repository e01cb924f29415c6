"""The curves of a search: each method's grid on the dev split, and the tuning it picks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from suites.console import drawn, make_console, say
from suites.curves import curves, eligible, not_done
from suites.documents import sheet
from suites.plan import Cell, records_folder, safe_name
from suites.record import write_whole
from suites.report import MixedRecordsError, require_comparable
from suites.sources import ROLES
from suites.suite import Suite, Tuning
from suites.table import load, spread
from suites.values import given


def present(cells: Sequence[Cell], out: Path) -> int:
    """Prints and writes the curves of `cells`; 0 if all of them are ok and comparable, else 1.

    Writes none while trials are not done, which would take the place of a whole grid.
    """
    console = make_console()
    records, problems = load(cells, out)
    for problem in problems:
        say(console, f"not counted: {problem}")
    failed = [record for record in records if record.status != "ok"]
    for record in failed:
        tuning = f"lr {given(record.tuning)['lr']:g} seed {record.seed}"
        say(console, f"{record.method_name} {tuning} {record.status}: {record.reason}")
    try:
        require_comparable(records)
    except MixedRecordsError as error:
        say(console, f"no curves: {error}")
        return 1
    left = not_done(cells, records)
    found = curves(records, left)
    suite = cells[0].suite
    if not found.empty:
        console.print(drawn(f"{suite.name}: grids on dev", words(found)))
    for line in unpicked(cells, found, left):
        say(console, line)
    say(console, f"records: {records_folder(suite, out, 'dev')}")
    if left or not found["num_ok"].any():
        why = "trials are not done" if left else "all trials failed"
        say(console, f"grids:   not written, as {why}")
        return 1
    try:
        others = of_others(found, suite, out)
        paths = write(pd.concat([others, found], ignore_index=True), suite, out)
    except (OSError, ValueError) as error:
        say(console, f"the grids cannot be written: {error}")
        return 1
    if not others.empty:
        say(console, f"kept from before: {', '.join(others['method'].unique())}")
    say(console, f"grids:   {', '.join(str(path) for path in paths)}")
    return 1 if failed else 0


def unpicked(cells: Sequence[Cell], found: pd.DataFrame, left: Mapping[str, int]) -> list[str]:
    """A line for each method without a pick, saying why."""
    lines = []
    for method, num_trials in Counter(cell.method for cell in cells).items():
        if method in left:
            why = f"trials are not done ({left[method]} of {num_trials})"
        else:
            own = found[found["method"] == method]
            if own["picked"].any():
                continue
            why = "none is ok with every seed" if own["num_ok"].any() else "all its trials failed"
        lines.append(f"{method}: no tuning is picked, as {why}")
    return lines


def of_others(found: pd.DataFrame, suite: Suite, out: Path) -> pd.DataFrame:
    """The curves that an earlier search of the suite wrote of methods that `found` has not.

    Raises:
        ValueError: the file that they are in is not like the one to be written in its place.
    """
    csv = grid_path(suite, out, "csv")
    if not csv.exists():
        return found.head(0)
    earlier = pd.read_csv(csv)
    if list(earlier.columns) != list(found.columns):
        raise ValueError(f"{csv} was written by another version; move it away and search again")
    return earlier[~earlier["method"].isin(found["method"])]


def grid_path(suite: Suite, out: Path, ending: str) -> Path:
    return out / "grids" / f"{safe_name(suite.name)}.{ending}"


def write(found: pd.DataFrame, suite: Suite, out: Path) -> list[Path]:
    """Writes the curves as CSV and Markdown, and as a figure where matplotlib is installed."""
    csv, markdown = (grid_path(suite, out, ending) for ending in ("csv", "md"))
    write_whole(found.to_csv(index=False), csv)
    write_whole(sheet(f"{suite.name}: grids on dev", words(found)), markdown)
    if find_spec("matplotlib") is None:
        return [csv, markdown]
    figure = out / "figures" / f"{safe_name(suite.name)}-grid.png"
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(found, suite.name, figure)
    return [csv, markdown, figure]


def draw(found: pd.DataFrame, name: str, path: Path) -> None:
    """A panel a role: each method's dev score by learning rate, its pick marked with a ring.

    Drawn are the tunings that may be picked: see `curves`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, len(ROLES), sharex=True)
    found = found[eligible(found)].sort_values("lr")
    for panel, role in zip(panels, ROLES, strict=True):
        for method, own in found.groupby("method", sort=False):
            errors = own[f"{role}_ci95"].astype(float).fillna(0.0)
            values = own[role].astype(float)
            line = panel.errorbar(own["lr"], values, errors, marker=".", capsize=2, label=method)
            picked = own[own["picked"]]
            panel.plot(
                picked["lr"], picked[role], "o", ms=12, mfc="none", color=line[0].get_color()
            )
        panel.set(xscale="log", xlabel="learning rate", ylabel=f"{role} on dev")
    if not found.empty:
        panels[0].legend()
    figure.suptitle(f"{name}: mean over seeds, 95 % interval; ring: picked")
    figure.savefig(path, dpi=150)


def picks(cells: Sequence[Cell], out: Path) -> dict[str, Tuning]:
    """Method -> the tuning that its trials `cells` pick.

    A method with a trial that is not done has none, nor has one without an eligible tuning.
    """
    records, _ = load(cells, out)
    found = curves(records, not_done(cells, records))
    return {
        row["method"]: Tuning(row["lr"], row["weight_decay"])
        for row in found.to_dict("records")
        if row["picked"]
    }


def words(found: pd.DataFrame) -> pd.DataFrame:
    """The curves as printed."""
    return pd.DataFrame(
        {
            "method": row["method"],
            "lr": f"{row['lr']:g}",
            "decay": f"{row['weight_decay']:g}",
            "seeds": f"{row['num_ok']}/{row['num_seeds']}",
            "dev target ± 95 %": spread(row, "target", ".3f"),
            "dev retention ± 95 %": spread(row, "retention", ".3f"),
            "": mark(row),
        }
        for row in found.to_dict("records")
    )


def mark(row: dict[str, Any]) -> str:
    if not eligible(row):
        return "not eligible"
    marks = {(True, True): "picked, at edge", (True, False): "picked"}
    return marks.get((row["picked"], row["at_edge"]), "")
