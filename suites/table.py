"""The table in words and rounded numbers, as it is printed on a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from suites import documents, inputs, progress, report, stats
from suites.console import drawn, make_console, say
from suites.notes import SIGNIFICANT, UNMATCHED, footnotes, rates
from suites.plan import Cell, records_folder
from suites.record import DamagedRecordError, Record, read
from suites.sources import ROLES

MIB = 2**20


def present(cells: Sequence[Cell], out: Path) -> int:
    """Prints and writes the table of `cells`; 0 if all of them are ok and comparable, else 1."""
    console = make_console()
    records, problems = load(cells, out)
    problems = [f"not counted: {problem}" for problem in problems]
    for problem in problems:
        say(console, problem)
    if not records:
        return 1
    try:
        frame = report.frame(records, Counter(cell.method for cell in cells))
    except report.MixedRecordsError as error:
        say(console, f"no table: {error}")
        return 1
    suite, by_task = cells[0].suite, report.tasks(records)
    tables = {"Quality": quality(frame), "Cost": cost(frame)}
    if by_task["task"].nunique() > by_task["role"].nunique():
        tables["Tasks"] = scores(by_task)
    notes = [*rates(cells), *footnotes(frame, records)]
    path_of = {(cell.method, cell.seed): cell.found_path(out) for cell in cells}
    files = {path_of[record.method_name, record.seed]: record for record in records}
    paths, unwritten = [], ""
    try:
        full = {"": frame, "-tasks": by_task}
        paths = documents.write(suite, tables, notes + problems, full, files, out)
    except OSError as error:
        unwritten = f"the table cannot be written: {error}"
    for title, table in tables.items():
        console.print(drawn(f"{suite.name}: {title.lower()}", table))
    for note in notes:
        console.print(note)
    if unwritten:
        say(console, unwritten)
        return 1
    say(console, f"records: {records_folder(suite, out, cells[0].split)}")
    for folder in dict.fromkeys(path.parent for path in paths):
        first, *others = [path for path in paths if path.parent == folder]
        endings = [path.name.removeprefix(first.stem) for path in others]
        say(console, ", ".join([f"{folder.name + ':':8} {first}", *endings]))
    return 0 if not problems and all(record.status == "ok" for record in records) else 1


def load(cells: Sequence[Cell], out: Path) -> tuple[list[Record], list[str]]:
    """The cells' records, method by method, and a line for each that is missing or damaged."""
    methods = list(dict.fromkeys(cell.method for cell in cells))
    with inputs.unchanged():
        ordered = sorted(cells, key=lambda cell: methods.index(cell.method))
        found = [_load(cell, out) for cell in ordered]
    records = [each for each in found if isinstance(each, Record)]
    return records, [each for each in found if isinstance(each, str)]


def _load(cell: Cell, out: Path) -> Record | str:
    """The cell's record, or why there is none."""
    path = cell.found_path(out)
    if not path.exists():
        if is_locked(cell.lock_path(out)):
            return f"{progress.title(cell)} is being run by another process"
        return f"{path}: not run yet"
    try:
        found = read(path)
    except DamagedRecordError as error:
        return str(error)
    if found.cell_hash == cell.hash:
        return found
    return f"{path}: made with other settings, data or embedded world than these"


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock `path`."""
    from filelock import FileLock, Timeout

    if not path.exists():
        return False
    try:
        with FileLock(path, blocking=False):
            return False
    except Timeout:
        return True


def quality(frame: pd.DataFrame) -> pd.DataFrame:
    """What each method reached, and with how many weights."""
    rows = []
    for row in frame.to_dict("records"):
        mark = "" if row["matched"] else UNMATCHED
        rows.append(
            {
                "method": row["method"],
                "seeds": f"{row['num_ok']}/{row['num_seeds']}",
                "weights": number(row["num_trainable"], ",.0f", mark),
                "%": number(row["trainable_percent"], ".2f"),
                "lr": number(row["lr"], "g"),
                "target": spread(row, "target", ".3f"),
                "retention": spread(row, "retention", ".3f"),
                f"vs {report.BASELINE}": differences(row),
            }
        )
    return pd.DataFrame(rows)


def scores(by_task: pd.DataFrame) -> pd.DataFrame:
    """What each method reached in each task."""
    rows = []
    for row in by_task.to_dict("records"):
        score, difference = spread(row, "score", ".3f"), f"minus_{report.BASELINE}"
        words = {"task": row["task"], "metric": row["metric"].partition(",")[0]}
        words |= {"of": row["role"], "method": row["method"], "score": score}
        rows.append({**words, f"vs {report.BASELINE}": starred(row, difference)})
    return pd.DataFrame(rows)


def differences(row: dict) -> str:
    """What target and retention are above the baseline's, with a star where it is significant."""
    words = [starred(row, f"{role}_minus_{report.BASELINE}") for role in ROLES]
    return "-" if set(words) == {"-"} else " / ".join(words)


def starred(row: dict, name: str) -> str:
    """The difference `name`, with a star where it is significant."""
    p_value = row[f"{name}_p"]
    star = SIGNIFICANT if p_value is not None and p_value < stats.SIGNIFICANCE else ""
    return number(row[name], "+.3f", star)


def cost(frame: pd.DataFrame) -> pd.DataFrame:
    """What each method took: time by step, and memory and files in MiB."""
    rows = []
    for row in frame.to_dict("records"):
        rows.append(
            {
                "method": row["method"],
                "ms/step": spread(row, "step_seconds", ".1f", 1000),
                f"x {report.BASELINE}": spread(row, f"step_ratio_to_{report.BASELINE}", ".2f"),
                "peak load/train/eval": " / ".join(
                    number(row[f"{phase}_peak_bytes"], ".0f", scale=1 / MIB)
                    for phase in ("load", "train", "evaluate")
                ),
                "backward": number(row["saved_for_backward_bytes"], ".2f", scale=1 / MIB),
                "optimizer": number(row["optimizer_state_bytes"], ".2f", scale=1 / MIB),
                "artifact": number(row["artifact_bytes"], ".2f", scale=1 / MIB),
            }
        )
    return pd.DataFrame(rows)


def number(value: float | None, style: str, mark: str = "", scale: float = 1) -> str:
    """`value` x `scale` in `style`, or a dash where there is none."""
    return "-" if value is None or pd.isna(value) else f"{value * scale:{style}}{mark}"


def spread(row: dict, name: str, style: str, scale: float = 1) -> str:
    """Mean ± half of the 95 % interval, which one seed does not have."""
    half_width = row[f"{name}_ci95"]
    mean = number(row[name], style, scale=scale)
    if half_width is None or pd.isna(half_width) or mean == "-":
        return mean
    return f"{mean} ± {half_width * scale:{style}}"
