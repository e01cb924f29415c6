"""A grid of footprints in one command: `python -m suites.footprints footprint`.

Runs a footprint suite at every combination of budget, quantisation, checkpointing and micro-batch,
each resumable as any run is, and writes one table of ratios: time and peak memory of a train step
to those of the faster, respectively smaller, LoRA with as many weights in the same setting.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suites import run
from suites.catalog import SUITES
from suites.options import BAD_INPUT, Parser, parse_methods
from suites.overrides import override
from suites.plan import plan
from suites.run import FAILED
from suites.suite import Suite
from suites.values import choose

if TYPE_CHECKING:
    import pandas as pd

    from suites.record import Record

#: LoRA as peft ships it, and in the model's own dtype; which is faster is for the GPU to say.
RIVALS = ("lora", "lora-bf16")
WHOLE = ("full", "full-bf16")
METHODS = ("frozen", *RIVALS, "lora-dropout", "shira", *WHOLE, "spiel", "spiel-ma")

#: What `--vary` can name -> the values of that flag, None for the flag left out.
AXES: dict[str, tuple[Any, ...]] = {
    "budget": ("r8", "r16", "r64"),
    "quantize": (None, "4bit"),
    "gradient_checkpointing": (None, True),
    "batch_size": (1, 4),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    try:
        suite = choose("footprint suite", arguments.suite, measuring())
        methods = parse_methods(arguments.methods, suite)
        names = axes(arguments.vary)
    except ValueError as error:
        parser.error(str(error))
    status = 0
    for setting in settings(names):
        own = contenders(methods, setting)
        if own:
            status = max(status, run.main(command(suite, own, setting, arguments.out)))
        if status >= BAD_INPUT:
            return status
    return max(status, present(suite, methods, names, arguments.out))


def make_parser() -> Parser:
    parser = Parser(prog="python -m suites.footprints", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("suite", help=f"one of: {', '.join(measuring())}")
    add("--methods", metavar="A,B", default=",".join(METHODS),
        help="methods by name (default: %(default)s)")  # fmt: skip
    add("--vary", metavar="A,B", default=",".join(AXES),
        help="what to vary, the rest being the suite's (default: all, %(default)s)")  # fmt: skip
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="results folder")
    return parser


def measuring() -> dict[str, Suite]:
    """The suites that measure time and memory alone."""
    return {name: suite for name, suite in SUITES.items() if not suite.tasks}


def axes(text: str) -> list[str]:
    """`budget,batch_size` -> those of AXES; ValueError names the allowed ones."""
    names = [name.strip().replace("-", "_") for name in text.split(",") if name.strip()]
    for name in names:
        choose("axis", name, AXES)
    return names


def settings(names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of the axes `names`."""
    for values in itertools.product(*(AXES[name] for name in names)):
        yield dict(zip(names, values, strict=True))


def contenders(methods: Sequence[str], setting: dict[str, Any]) -> list[str]:
    """`methods`, of which full fine-tuning cannot train a quantised model."""
    return [name for name in methods if name not in WHOLE or setting.get("quantize") is None]


def command(suite: Suite, methods: Sequence[str], setting: dict[str, Any], out: Path) -> list[str]:
    """The arguments of `suites.run` for one setting, as anybody could type them."""
    flags: list[str] = []
    for name, value in setting.items():
        if value is not None:
            flag = "--" + name.replace("_", "-")
            flags += [flag] if value is True else [flag, str(value)]
    return [suite.name, "--methods", ",".join(methods), *flags, "--out", str(out)]


def present(suite: Suite, methods: Sequence[str], names: Sequence[str], out: Path) -> int:
    """Prints and writes the table of ratios; 0 if all cells are ok and comparable, else 1."""
    from suites.console import drawn, make_console, say
    from suites.notes import machine
    from suites.report import MixedRecordsError

    console, found, problems = make_console(), [], []
    for setting in settings(names):
        own, lacking = _load(suite, methods, setting, out)
        found.append((setting, own))
        problems += [f"not counted: {problem}" for problem in lacking]
    for problem in problems:
        say(console, problem)
    records = [each for _, own in found for each in own]
    if not records:
        return FAILED
    try:
        frame = tabulated(found)
    except MixedRecordsError as error:
        say(console, f"no table: {error}")
        return FAILED
    title, notes = f"{suite.name}: a train step, and as a ratio to LoRA's", machine(records)
    console.print(drawn(title, frame))
    for note in notes:
        say(console, note)
    try:
        markdown, csv = write(suite, title, frame, notes + problems, out)
    except OSError as error:
        say(console, f"the table cannot be written: {error}")
        return FAILED
    say(console, f"tables:  {markdown}, {csv}")
    return FAILED if problems or any(each.status != "ok" for each in records) else 0


def _load(
    suite: Suite, methods: Sequence[str], setting: dict[str, Any], out: Path
) -> tuple[list[Record], list[str]]:
    from suites.table import load

    own = contenders(methods, setting)
    return load(plan(override(suite, **setting), own, suite.seeds[:1]), out)


def tabulated(found: Sequence[tuple[dict[str, Any], Sequence[Record]]]) -> pd.DataFrame:
    """The rows of all settings; MixedRecordsError if they were not all measured on one machine."""
    import pandas as pd

    from suites.report import require_one
    from suites.values import given

    rows = [row for setting, own in found for row in compared(setting, own)]
    measured = [each for _, own in found for each in own if each.status == "ok"]
    require_one(
        "hardware",
        measured,
        lambda each: given(each.environment).hardware,
        named=lambda each: each.suite_name,
    )
    return pd.DataFrame(rows)


def write(
    suite: Suite, title: str, frame: pd.DataFrame, notes: Sequence[str], out: Path
) -> tuple[Path, Path]:
    """Writes the table in Markdown and in CSV."""
    from suites.documents import sheet
    from suites.record import write_whole

    folder = out / "tables"
    markdown, csv = (folder / f"{suite.name}-ratios.{ending}" for ending in ("md", "csv"))
    write_whole(sheet(title, frame, notes), markdown)
    write_whole(frame.to_csv(index=False), csv)
    return markdown, csv


def compared(setting: dict[str, Any], records: Sequence[Record]) -> list[dict[str, str]]:
    """A row a method: milliseconds and MiB of a train step, and their ratios to the best LoRA's.

    Raises MixedRecordsError for records that do not belong together.
    """
    from suites.report import require_comparable, step_seconds, train_peak_bytes
    from suites.table import MIB, number

    require_comparable(records)
    rivals = [each for each in records if each.status == "ok" and each.method_name in RIVALS]
    fastest = least(step_seconds(each) for each in rivals)
    smallest = least(train_peak_bytes(each) for each in rivals)
    labels = {name: "-" if value is None else str(value) for name, value in setting.items()}
    rows = []
    for each in records:
        cells = ["-", each.status, "-", each.status]
        if each.status == "ok":
            seconds, peak = step_seconds(each), train_peak_bytes(each)
            cells = [number(seconds, ".1f", scale=1e3), ratio(seconds, fastest)]
            cells += [number(peak, ".0f", scale=1 / MIB), ratio(peak, smallest)]
        columns = ("ms/step", "time x lora", "MiB", "memory x lora")
        rows.append(labels | {"method": each.method_name} | dict(zip(columns, cells, strict=True)))
    return rows


def least(values: Iterable[float | None]) -> float | None:
    """The least of the rivals' `values`; None if there is none, or one was not measured (0)."""
    return min((value or 0.0 for value in values), default=0.0) or None


def ratio(value: float | None, to: float | None) -> str:
    """`value` / `to`, or a dash where either is unknown."""
    return "-" if value is None or to is None else f"{value / to:.3f}"


if __name__ == "__main__":
    sys.exit(main())
