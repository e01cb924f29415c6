"""Fails when a method got worse, slower or larger: `python -m suites.gate quickstart`.

Judges the records of a results folder by those of another, which was kept from an earlier run of
the same suite: `python -m suites.run quickstart --methods lora,spiel --out results/baselines`.
All that was kept counts, but for what `--methods` and `--seeds` leave out.

Exit status: 0 if nothing got worse, 1 if something did or is missing, 2 for bad input.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from suites.methods import METHODS
from suites.options import Parser, add_overrides, cells_parser
from suites.plan import Cell, plan, records_folder, safe_name
from suites.run import FAILED, selected
from suites.suite import Suite, Tuning

if TYPE_CHECKING:
    from suites.record import Record


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        suite, kept = chosen(arguments)
        if not arguments.out.is_dir():
            raise ValueError(f"--out: {arguments.out} is no folder; run suites.run into it first")
    except ValueError as error:
        parser.error(str(error))
    return present(suite, kept, arguments.out, arguments.against)


def make_parser() -> Parser:
    parser = cells_parser(
        "python -m suites.gate",
        "Fails when a method got worse, slower or larger than it was in a kept run.",
        methods="all that were kept",
        seeds="all that were kept",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="results to judge")
    add("--against", type=Path, default=Path("results/baselines"), metavar="DIR",
        help="the kept results (default: results/baselines)")  # fmt: skip
    add_overrides(parser)
    return parser


def chosen(arguments: argparse.Namespace) -> tuple[Suite, list[Record]]:
    """The suite, and those of its kept records to judge by.

    Raises ValueError if they have no ok one of a method, or if a file is no record.
    """
    suite, methods, seeds = selected(arguments)
    folder = records_folder(suite, arguments.against)
    records = kept_records(folder)
    if arguments.seeds is not None:
        records = [each for each in records if each.seed in seeds]
    kept = [each for each in records if arguments.methods is None or each.method_name in methods]
    wanted = dict.fromkeys(each.method_name for each in kept)
    if arguments.methods is not None or not kept:
        wanted = dict.fromkeys(methods)
    lacking = wanted.keys() - {each.method_name for each in kept if each.status == "ok"}
    if lacking:
        names = ", ".join(name for name in wanted if name in lacking)
        raise ValueError(
            f"no ok records of {names} to judge by in {folder}; suites.run with "
            f"--out {arguments.against} keeps some"
        )
    return suite, with_baseline(suite, kept, records)


def kept_records(folder: Path) -> list[Record]:
    """All in `folder`, method by method."""
    from suites.record import read

    ranks = {name: rank for rank, name in enumerate(METHODS)}
    found = sorted(
        map(read, folder.glob("*.json")),
        key=lambda each: (ranks.get(each.method_name, len(ranks)), each.method_name, each.seed),
    )
    for one, other in pairwise(found):
        if (one.method_name, one.seed) == (other.method_name, other.seed):
            raise ValueError(
                f"{folder} has several records of {one.method_name} seed {one.seed}, at different "
                "learning rates: keep one of them"
            )
    return found


def with_baseline(suite: Suite, kept: list[Record], records: Sequence[Record]) -> list[Record]:
    """`kept`, and from `records` the method to whose costs all others' are ratios."""
    from suites.report import BASELINE

    if BASELINE in {each.method_name for each in kept} or BASELINE not in suite.tunings:
        return kept
    seeds = {each.seed for each in kept if each.tuning is not None}  # the others have no costs
    beside = [each for each in records if each.method_name == BASELINE and each.seed in seeds]
    return [*kept, *beside]


def divided(
    suite: Suite, kept: Sequence[Record], out: Path, against: Path
) -> tuple[list[Cell], list[Record]]:
    """The cells that `kept` are of, and those records whose cell is no longer run."""
    from suites.table import is_locked

    cells, gone = {}, []
    for each in kept:
        with contextlib.suppress(ValueError):  # the suite has this method no more
            cell = cell_of(each, suite, against)
            is_run = cell.record_path(out).exists() or is_locked(cell.lock_path(out))
            if is_run and cell.record_path(against).exists():
                cells[each.method_name, each.seed] = cell
                continue
        gone.append(each)
    return list(cells.values()), gone


def cell_of(kept: Record, suite: Suite, against: Path) -> Cell:
    """What the record `kept` is of: at its own tuning if a search picked that, else the suite's.

    Raises ValueError if the suite has no tuning for its method.
    """
    if kept.tuning is not None:
        picked = {kept.method_name: Tuning(**kept.tuning)}
        (cell,) = plan(suite, [kept.method_name], [kept.seed], picked)
        if cell.record_path(against).exists():
            return cell
    (cell,) = plan(suite, [kept.method_name], [kept.seed])
    return cell


def loaded(
    suite: Suite, kept: Sequence[Record], out: Path, against: Path
) -> tuple[list[Record], list[Record], list[str]]:
    """The records now and before, and a line for each that is no longer run or cannot be judged."""
    from suites.table import load

    cells, gone = divided(suite, kept, out, against)
    (now, problems), (before, kept_problems) = load(cells, out), load(cells, against)
    lines = [f"{each.method_name} seed {each.seed}: kept, but no longer run" for each in gone]
    lines += [f"not judged: {problem}" for problem in problems + kept_problems]
    lines += [
        f"{each.method_name} seed {each.seed}: {each.status}: {each.reason}"
        for each in now
        if each.status != "ok"
    ]
    return now, [*before, *gone], lines + stale(now, out)


def stale(now: Sequence[Record], out: Path) -> list[str]:
    """A line if records were made by other code than what is judged; what is not known is passed
    over.
    """
    from suites.provenance import code_hash, git_revision

    here = code_hash()
    made = [each.environment for each in now if each.environment]
    others = {each.git_revision or "unknown" for each in made if each.code_hash not in ("", here)}
    if not others:
        return []
    found = ", ".join(sorted(each[:12] for each in others))
    return [
        f"{out} has results by other code than there is here (theirs was of revision {found}, this "
        f"is of {(git_revision() or 'unknown')[:12]}, or either was changed since): run them again "
        "with --force"
    ]


def present(suite: Suite, kept: Sequence[Record], out: Path, against: Path) -> int:
    """Prints what changed, writes it beside the tables; 1 if something got worse or is missing."""
    import pandas as pd

    from suites import judgement
    from suites.console import drawn, make_console, say
    from suites.documents import sheet
    from suites.record import write_whole

    console, title = make_console(), f"{suite.name}: now and before"
    now, before, problems = loaded(suite, kept, out, against)
    findings, notes = [], []
    try:
        findings = judgement.judge(now, before)
        notes = [*judgement.notes(findings), *judgement.versions(now, before)]
        notes += judgement.machines(now, before)
    except judgement.MixedRecordsError as error:
        problems.append(f"not judged: {error}")
    for problem in problems:
        say(console, problem)
    frame = pd.DataFrame([judgement.row(finding) for finding in findings])
    told = judgement.conclusion(findings)
    if findings:
        console.print(drawn(title, frame))
    for note in notes:
        console.print(note)
    say(console, told)
    path = out / "tables" / f"{safe_name(suite.name)}-gate.md"
    try:
        write_whole(sheet(title, frame, [told, *problems, *notes]), path)
    except OSError as error:
        say(console, f"{path} cannot be written: {error}")
        return FAILED
    say(console, f"written to {path}")
    is_worse = any(finding.verdict == judgement.WORSE for finding in findings)
    return FAILED if is_worse or problems else 0


if __name__ == "__main__":
    sys.exit(main())
