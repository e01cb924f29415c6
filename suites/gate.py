"""Fails when a method got worse, slower or larger: `python -m suites.gate quickstart`.

Judges the records of a results folder by those of another, which was kept from an earlier run of
the same suite: `python -m suites.run quickstart --methods lora,spiel --out results/baselines`.

Exit status: 0 if nothing got worse, 1 if something did or is missing, 2 for bad input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from suites.options import Parser, add_overrides, cells_parser
from suites.plan import Cell, plan, safe_name
from suites.run import FAILED, selected

if TYPE_CHECKING:
    import pandas as pd


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        cells = plan(*selected(arguments))
        kept = kept_cells(cells, arguments.against, arguments.methods is not None)
        kept = with_baseline(kept, arguments.against)
    except ValueError as error:
        parser.error(str(error))
    return present(kept, arguments.out, arguments.against)


def make_parser() -> Parser:
    parser = cells_parser(
        "python -m suites.gate",
        "Fails when a method got worse, slower or larger than it was in a kept run.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="results to judge")
    add("--against", type=Path, default=Path("results/baselines"), metavar="DIR",
        help="the kept results (default: results/baselines)")  # fmt: skip
    add_overrides(parser)
    return parser


def kept_cells(cells: Sequence[Cell], against: Path, all_methods: bool) -> list[Cell]:
    """Those of `cells` with a record in `against`.

    Raises ValueError if there are none or, if `all_methods`, of one of the methods.
    """
    kept = [cell for cell in cells if cell.record_path(against).exists()]
    with_baseline = {cell.method for cell in kept}
    lacking = [m for m in dict.fromkeys(cell.method for cell in cells) if m not in with_baseline]
    if not kept or (all_methods and lacking):
        folder = cells[0].record_path(against).parent
        raise ValueError(f"no records of {', '.join(lacking)} to judge by in {folder}")
    return kept


def with_baseline(kept: Sequence[Cell], against: Path) -> list[Cell]:
    """`kept`, and those of the method to whose costs all others' are ratios."""
    from suites.report import BASELINE

    suite = kept[0].suite
    if BASELINE in {cell.method for cell in kept} or BASELINE not in suite.tunings:
        return list(kept)
    beside = plan(suite, [BASELINE], dict.fromkeys(cell.seed for cell in kept))
    return [*kept, *(cell for cell in beside if cell.record_path(against).exists())]


def present(cells: Sequence[Cell], out: Path, against: Path) -> int:
    """Prints what changed, writes it beside the tables; 1 if something got worse or is missing."""
    import pandas as pd

    from suites import judgement
    from suites.table import drawn, load, make_console, say

    console, name = make_console(), cells[0].suite.name
    (now, problems), (before, kept_problems) = load(cells, out), load(cells, against)
    for problem in [*problems, *kept_problems]:
        say(console, f"not judged: {problem}")
    try:
        findings = judgement.judge(now, before)
    except judgement.MixedRecordsError as error:
        say(console, f"not judged: {error}")
        return FAILED
    frame = pd.DataFrame([judgement.row(finding) for finding in findings])
    notes = [*judgement.notes(findings), *judgement.machines(now, before)]
    console.print(drawn(f"{name}: now and before", frame))
    for note in notes:
        console.print(note, markup=False, highlight=False)
    num_worse = sum(finding.verdict == judgement.WORSE for finding in findings)
    say(console, f"{num_worse} of {len(findings)} measures got worse")
    path = out / "tables" / f"{safe_name(name)}-gate.md"
    try:
        write(frame, notes, name, path)
    except OSError as error:
        say(console, f"{path} cannot be written: {error}")
        return FAILED
    say(console, f"written to {path}")
    return FAILED if num_worse or problems or kept_problems else 0


def write(frame: pd.DataFrame, notes: Sequence[str], name: str, path: Path) -> None:
    from suites.record import write_whole

    text = frame.to_markdown(index=False, disable_numparse=True)
    write_whole("\n\n".join([f"# {name}: now and before", text, *notes]) + "\n", path)


if __name__ == "__main__":
    sys.exit(main())
