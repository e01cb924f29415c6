"""The command: `python -m suites.run quickstart --methods base,full,lora,spiel`.

Exit status: 0 if every cell is ok, 1 if one is not, or its artifact not kept as it should be, 2 for
bad input, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from suites.catalog import SUITES
from suites.methods import entry_of
from suites.options import BAD_INPUT, execution, listing, make_parser, parse_methods, parse_seeds
from suites.overrides import OVERRIDES, override
from suites.plan import Cell, Execution, plan, plan_search
from suites.suite import Suite
from suites.user_suite import is_file, load_suite
from suites.values import choose

FAILED, INTERRUPTED = 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(listing())
        return 0
    searching = arguments.search or arguments.search_only
    try:
        suite, methods, seeds = selected(arguments, searching)
        cells = (plan_search if searching else plan)(suite, methods, seeds)
        if arguments.plan:
            return preview(cells, arguments.out, execution(arguments))
        if arguments.report:
            return conclude(cells, arguments.out, searching)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, _interrupt)
    # A closed terminal, unless nohup has it ignored.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _interrupt)
    way = execution(arguments)
    try:
        if not searching:
            return start(cells, arguments.out, way)
        status = start(cells, arguments.out, way, searching=True)
        if arguments.search_only or status == BAD_INPUT:
            return status
        return max(status, start_at_picks(cells, methods, arguments.out, way))
    except KeyboardInterrupt:
        print("stopped; the same command continues with what is not done", file=sys.stderr)
        return INTERRUPTED


def preview(cells: Sequence[Cell], out: Path, way: Execution) -> int:
    """Prints what would run; starts nothing."""
    # Importing the libraries makes a great many objects and no garbage: looking for some among
    # them, over and over, is a sixth of the time.
    gc.disable()
    # It warns of a kernel for 4-bit weights on CPUs as it is imported, which no plan needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        from suites import preview as room

        return room.present(cells, out, way)
    finally:
        gc.enable()


def selected(
    arguments: argparse.Namespace, searching: bool = False
) -> tuple[Suite, tuple[str, ...], tuple[int, ...]]:
    """The suite as the flags change it, methods and seeds; ValueError for what there is not."""
    name = arguments.suite
    if name is None:
        raise ValueError(f"no suite given; choose from {', '.join(SUITES)}")
    found = load_suite(name) if is_file(name) else choose("suite", name, SUITES)
    suite = override(found, **{flag: getattr(arguments, flag) for flag in OVERRIDES})
    methods = parse_methods(arguments.methods, suite, searching)
    seeds = suite.seeds if arguments.seeds is None else parse_seeds(arguments.seeds)
    return suite, methods, seeds


def start(cells: Sequence[Cell], out: Path, way: Execution, searching: bool = False) -> int:
    """Runs what is not finished and prints the table; returns the exit status."""
    from suites import runner
    from suites.console import make_console
    from suites.progress import progress

    try:
        runner.check_folder(out, cells)
    except runner.NotReadyError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    done, others = ([], []) if way.force else runner.finished(cells, out)
    left = [cell for cell in cells if cell not in done]
    with progress(make_console(stderr=True), left) as view:
        for problem in others:
            view.say(f"not counted, and run again: {problem}")
        if done:
            view.say(
                f"{len(done)} of {len(cells)} cells are finished and skipped (--force runs them)"
            )
        older = runner.of_other_code(done, out) if left else []
        if older:
            names = ", ".join(cell.name for cell in older)
            view.say(f"finished by other code than there is now, and in the same table: {names}")
        try:
            if left:
                runner.run(left, out, way, view, others_are_done=bool(done))
        except runner.NotReadyError as error:
            view.say(f"error: {error}")
            return BAD_INPUT
        except runner.UnwrittenError as error:
            view.say(f"stopped: {error}")
            return FAILED
        lacking = runner.without_artifact(cells, out) if way.keep_artifacts else []
        if lacking:
            names = ", ".join(cell.name for cell in lacking)
            view.say(f"no artifact was kept of {names}; --force runs finished cells again")
    return max(conclude(cells, out, searching), FAILED if lacking else 0)


def start_at_picks(
    trials: Sequence[Cell], methods: Sequence[str], out: Path, way: Execution
) -> int:
    """Runs the methods at what the search over `trials` picked, with its seeds."""
    from suites import search

    picks = search.picks(trials, out)
    seeds = dict.fromkeys(cell.seed for cell in trials)
    able = [name for name in methods if name in picks or not entry_of(name).trains]
    return start(plan(trials[0].suite, able, seeds, picks), out, way)


def conclude(cells: Sequence[Cell], out: Path, searching: bool) -> int:
    """Prints and writes the table of `cells`, or the curves of a search, from their records."""
    if searching:
        from suites import search

        return search.present(cells, out)
    from suites import table

    return table.present(cells, out)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
