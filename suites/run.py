"""The command: `python -m suites.run quickstart --methods base,full,lora,spiel`.

Exit status: 0 if every cell is ok, 1 if one is not, 2 for bad input, 130 when stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from suites.catalog import SUITES
from suites.methods import METHODS
from suites.plan import Cell, choose, nearest, override, plan, plan_search
from suites.suite import Suite

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line that names it and what is allowed."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_args(self, *arguments: Any, **options: Any) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(*arguments, **options)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = ", ".join(nearest(unknown[0].partition("=")[0], flags))
            self.error(f"unknown argument {unknown[0]!r}; choose from {near}")
        return parsed


def make_parser() -> Parser:
    parser = Parser(
        prog="python -m suites.run",
        description="Trains and evaluates methods on a suite, seed by seed, and prints the table.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("suite", nargs="?", help=f"one of: {', '.join(SUITES)}")
    add("--methods", metavar="A,B", help="methods by name (default: all the suite has tuned)")
    add("--seeds", metavar="0,1,2", help="seeds (default: the suite's)")
    add("--steps", type=_count, metavar="N", help="train steps instead of the suite's")
    add("--limit", type=_count, metavar="N", help="at most N items of each task")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="results folder")
    add("--force", action="store_true", help="run finished cells again")
    add("--search", action="store_true", help="try each method's grid on the dev split")
    add("--list", action="store_true", help="list suites and methods and stop")
    return parser


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2); ValueError names what is wrong."""
    parts = text.split(",")
    bad = [part for part in parts if not part.isascii() or not part.isdigit()]
    if bad:
        raise ValueError(f"--seeds: {bad[0]!r} in {text!r} is no whole number; allowed: as 0,1,2")
    if int(max(parts, key=int)) >= 2**32:
        raise ValueError(f"--seeds: {max(parts, key=int)} is too large; allowed: below 2**32")
    if len({int(part) for part in parts}) < len(parts):
        raise ValueError(f"--seeds: {text!r} names a seed twice; allowed: each once")
    return tuple(int(part) for part in parts)


def parse_methods(text: str | None, suite: Suite) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"), each once; None is every method that the suite can train."""
    if text is None:
        return tuple(
            name for name, entry in METHODS.items() if not entry.trains or name in suite.tunings
        )
    names = [name.strip() for name in text.split(",")]
    for name in names:
        choose("method", name, METHODS)
    return tuple(dict.fromkeys(names))


def listing() -> str:
    """Suites and methods, a line each."""
    lines = ["suites"]
    lines += [f"  {name:<14}{suite.description}" for name, suite in SUITES.items()]
    lines += ["methods"]
    lines += [f"  {name:<14}{entry.description}" for name, entry in METHODS.items()]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if arguments.list:
        print(listing())
        return 0
    if arguments.suite is None:
        parser.error(f"no suite given; choose from {', '.join(SUITES)}")
    try:
        suite = override(choose("suite", arguments.suite, SUITES), arguments.steps, arguments.limit)
        methods = parse_methods(arguments.methods, suite)
        seeds = suite.seeds if arguments.seeds is None else parse_seeds(arguments.seeds)
        cells = (plan_search if arguments.search else plan)(suite, methods, seeds)
    except ValueError as error:
        parser.error(str(error))
    try:
        return start(cells, arguments.out, arguments.force, arguments.search)
    except KeyboardInterrupt:
        print("stopped; the same command continues with what is not done", file=sys.stderr)
        return INTERRUPTED


def start(cells: Sequence[Cell], out: Path, force: bool, search: bool) -> int:
    """Runs what is not finished and prints the table; returns the exit status."""
    from rich.console import Console

    from suites import runner
    from suites.progress import progress

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        runner.check_folder(out)
    except runner.NotReadyError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    done, damaged = ([], []) if force else runner.finished(cells, out)
    left = [cell for cell in cells if cell not in done]
    with progress(Console(stderr=True), left) as view:
        for problem in damaged:
            view.say(f"damaged record, not counted: {problem}")
        if done:
            view.say(
                f"{len(done)} of {len(cells)} cells are finished and skipped (--force runs them)"
            )
        if left:
            try:
                runner.run(left, out, view)
            except runner.NotReadyError as error:
                view.say(f"error: {error}")
                return BAD_INPUT
            except runner.UnwrittenError as error:
                view.say(f"stopped: {error}")
                return FAILED
    return conclude(cells, out, search)


def conclude(cells: Sequence[Cell], out: Path, search: bool) -> int:
    """Prints and writes the table of `cells`, or the curves of a search, from their records."""
    if search:
        from suites import search as room
    else:
        from suites import table as room
    return room.present(cells, out)


def _interrupt(*_: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
