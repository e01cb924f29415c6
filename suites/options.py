"""The command's flags, and what their values may be."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NoReturn

from suites.catalog import SUITES
from suites.methods import METHODS, entry_of
from suites.plan import Execution
from suites.sources import DTYPES, QUANTIZATIONS
from suites.suite import Suite
from suites.values import nearest

BAD_INPUT = 2


class Parser(argparse.ArgumentParser):
    """Answers a mistake in one line that names it and what is allowed."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: error: {' '.join(message.split())}\n")

    def parse_args(  # type: ignore[override]  # nobody gives it a namespace of another class
        self, *arguments: Any, **options: Any
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(*arguments, **options)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = ", ".join(nearest(unknown[0].partition("=")[0], flags)[:3])
            self.error(f"unknown argument {unknown[0]!r}; nearest: {near}; --help has all")
        return parsed


def make_parser() -> Parser:
    parser = cells_parser(
        "python -m suites.run",
        "Trains and evaluates methods on a suite, seed by seed, and prints the table.",
    )
    add = parser.add_argument
    add("--search", action="store_true", help="pick learning rates on dev, then run the seeds")
    add("--search-only", action="store_true", help="try each grid on dev and stop")
    add("--plan", action="store_true", help="say what would run, its memory and time, and stop")
    add("--list", action="store_true", help="list suites and methods and stop")
    add_overrides(parser)
    _add_execution(parser.add_argument_group("how cells are run"))
    return parser


def cells_parser(
    prog: str,
    description: str,
    methods: str = "all methods the suite has a learning rate for",
    seeds: str = "the suite's",
) -> Parser:
    """A parser of what names the cells of a suite; `methods` and `seeds` say which are default."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    add = parser.add_argument
    names = ", ".join(SUITES)
    add("suite", nargs="?", help=f"one of: {names}; or a path to a file that defines SUITE")
    add("--methods", metavar="A,B", help=f"methods by name (default: {methods})")
    add("--seeds", metavar="0,1,2", help=f"seeds (default: {seeds})")
    return parser


def add_overrides(parser: Parser) -> None:
    """What changes a suite into another."""
    group = parser.add_argument_group("another suite: it has a name and a table of its own")
    add = group.add_argument
    add(
        "--model",
        type=_text,
        metavar="PATH",
        help="model folder or hub id, as owner/name or owner/name@commit",
    )
    add(
        "--data",
        type=_text,
        metavar="PATH",
        help="JSONL or parquet file, or hub id, as owner/name@commit",
    )
    add("--tasks", type=_text, metavar="A,B", help="tasks of the suite; others as name:metric:role")
    add("--task-folder", type=_text, metavar="DIR", help="lm-eval YAML and copies of hub data sets")
    add("--steps", type=_count, metavar="N", help="train steps")
    add("--batch-size", type=_count, metavar="N", help="sequences per micro-batch")
    add("--eval-batch-size", type=_count, metavar="N", help="sequences evaluated at once")
    add("--limit", type=_count, metavar="N", help="at most N items per task")
    add("--seq-len", type=_count, metavar="N", help="cut examples at N tokens")
    add("--dtype", choices=DTYPES, help="dtype of the base model")
    add("--quantize", choices=QUANTIZATIONS, help="base model in 4 bits (bitsandbytes nf4)")
    add("--budget", type=_text, metavar="B", help="trainable weights: r64, a number, or a density")
    add("--gradient-checkpointing", action="store_true", help="recompute activations")
    add("--allow-code-execution", action="store_true", help="include tasks that run generated code")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--device", type=_device, metavar="D", help="cpu, cuda or cuda:N")


def _add_execution(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="results folder")
    add("--report", action="store_true", help="the table of what is finished; run nothing")
    add("--force", action="store_true", help="run finished cells again")
    add("--keep-artifacts", action="store_true", help="keep adapters in DIR/artifacts")
    add("--processes", type=_count, default=1, metavar="N", help="train each cell on N processes")
    add("--save-minutes", type=_minutes, default=10.0, metavar="M",
        help="minutes of training between checkpoints; 0 for none (default: 10)")  # fmt: skip


def execution(arguments: argparse.Namespace) -> Execution:
    minutes = arguments.save_minutes
    return Execution(
        num_processes=arguments.processes,
        save_seconds=60 * minutes if minutes else None,
        force=arguments.force,
        keep_artifacts=arguments.keep_artifacts,
    )


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("'' is no value; allowed: anything that is not empty")
    return text


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _minutes(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes of at least 0")
    return float(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of cpu, cuda, cuda:N")
    return "cuda:0" if text == "cuda" else text


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0,1,2` -> (0, 1, 2); ValueError names what is wrong."""
    parts = [part.strip() for part in text.split(",")]
    bad = [part for part in parts if not part.isascii() or not part.isdigit()]
    if bad:
        raise ValueError(
            f"--seeds: {bad[0]!r} in {text!r} is not a whole number; allowed: as 0,1,2"
        )
    if int(max(parts, key=int)) >= 2**32:
        raise ValueError(f"--seeds: {max(parts, key=int)} is too large; allowed: below 2**32")
    if len({int(part) for part in parts}) < len(parts):
        raise ValueError(f"--seeds: {text!r} names a seed twice; allowed: each once")
    return tuple(int(part) for part in parts)


def parse_methods(text: str | None, suite: Suite, searching: bool = False) -> tuple[str, ...]:
    """`a,b` -> ("a", "b"), each once; None is every method that the suite can train."""
    if text is None:
        known = suite.grids if searching else suite.tunings or suite.grids
        return tuple(name for name, entry in METHODS.items() if not entry.trains or name in known)
    names = [name.strip() for name in text.split(",")]
    if "" in names:
        raise ValueError(f"--methods: {text!r} has an empty name; allowed: as spiel,lora")
    for name in names:
        entry_of(name)
    return tuple(dict.fromkeys(names))


def listing() -> str:
    """Suites and methods, a line each."""
    lines = ["suites"]
    lines += [f"  {name:<16}{suite.description}" for name, suite in SUITES.items()]
    lines += ["methods"]
    lines += [f"  {name:<16}{entry.description}" for name, entry in METHODS.items()]
    return "\n".join(lines)
