"""What `--plan` says: the cells, what of them is done, and what they will need."""

from __future__ import annotations

import dataclasses
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd

from suites import runner
from suites.budget import is_met
from suites.console import drawn, make_console, say
from suites.distributed import check_device, first_gpu, has_gpu, share
from suites.estimate import Estimate, earlier_records, estimate, seconds
from suites.hub import MISSING, missing_from_hub
from suites.notes import UNMATCHED
from suites.plan import Cell, Execution
from suites.progress import clock
from suites.provenance import Environment, environment
from suites.table import MIB
from suites.values import given

#: Column -> the field of an Estimate.
PARTS = {
    "model": "weights_bytes",
    "grad": "gradient_bytes",
    "optim": "optimizer_bytes",
    "activ": "activation_bytes",
}

#: So many methods are estimated one after the other.
FEW = 4

NOTE = (
    f"{UNMATCHED} not matched to the budget. "
    "Bytes by shapes, of one process: weights, gradients, optimizer, activations at full length "
    "(suites/estimate.py has the formulas). Time of a cell: estimated from finished ones on this "
    "hardware."
)


def present(cells: Sequence[Cell], out: Path, way: Execution) -> int:
    """Prints the plan; starts and writes nothing. Raises ValueError for what cannot be run."""
    suite, recipe = cells[0].suite, cells[0].suite.recipe
    share(recipe.batch_size, recipe.gradient_accumulation_steps, way.num_processes)
    check_device(suite.device, way.num_processes)
    missing = missing_from_hub(suite)
    done = runner.finished(cells, out)[0]
    records = earlier_records(out, _here(suite.device, way.num_processes))
    console = make_console()
    for cell in cells:
        say(console, f"{'done ' if cell in done else 'to do'} {cell.found_path(out)}")
    rows, left_seconds = [], []
    obstacles: dict[str, list[str]] = {}
    estimates = _estimates(cells, way)
    for name in estimates:
        own = [cell for cell in cells if cell.method == name]
        num_left = sum(cell not in done for cell in own)
        each = seconds(own[0], records)
        left_seconds.append(None if num_left and each is None else num_left * (each or 0.0))
        found = estimates[name]
        if isinstance(found, str):
            obstacles.setdefault(found, []).append(name)
        rows.append(_row(own, num_left, found, each))
    console.print(drawn(f"{suite.name}: plan", pd.DataFrame(rows)))
    notes = [f"{', '.join(names)}: {found}" for found, names in obstacles.items()]
    for note in [NOTE, *notes]:
        say(console, note)
    whole = "unknown" if None in left_seconds else clock(sum(map(given, left_seconds)))
    say(console, f"{len(cells) - len(done)} of {len(cells)} cells to do, time: {whole}")
    for line in [MISSING, *missing] if missing else ():
        say(console, line)
    return 0


def _estimates(cells: Sequence[Cell], way: Execution) -> dict[str, Estimate | str]:
    """One for each method, in their order; of many and large ones, several at a time."""
    first = {cell.method: cell for cell in reversed(cells)}
    names = list(dict.fromkeys(cell.method for cell in cells))
    ordered = [first[name] for name in names]
    if len(ordered) <= FEW or "fork" not in multiprocessing.get_all_start_methods():
        return {cell.method: _estimated(cell, way) for cell in ordered}
    for cell in ordered:
        cell.entry.load()  # what it imports is imported once, before the forks
    found = [_estimated(ordered[0], way)]
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        found += pool.map(_estimated, ordered[1:], [way] * len(names[1:]))
    return dict(zip(names, found, strict=True))


def _estimated(cell: Cell, way: Execution) -> Estimate | str:
    """The estimate, or why there is none: of one method, which is no reason to hide the others."""
    try:
        return estimate(cell, way)
    except (ValueError, OSError, ImportError) as error:
        return str(error).split("\n")[0]


def _row(
    own: Sequence[Cell], num_left: int, found: Estimate | str, each: float | None
) -> dict[str, str]:
    row = {
        "method": own[0].method,
        "done": f"{len(own) - num_left}/{len(own)}",
        "time": clock(each),
    }
    if isinstance(found, str):
        return {**row, **dict.fromkeys(("weights", "budget", *PARTS, "sum"), "-")}
    parts = {name: _size(getattr(found, part)) for name, part in PARTS.items()}
    return {**row, **_solved(own[0], found), **parts, "sum": _size(found.total_bytes)}


def _size(num_bytes: float) -> str:
    """`25 M` or `12.6 G`, in powers of 1024."""
    return f"{num_bytes / MIB:.0f} M" if num_bytes < 1024 * MIB else f"{num_bytes / 2**30:.1f} G"


def _solved(cell: Cell, found: Estimate) -> dict[str, str]:
    share_of_budget = found.num_trainable / found.num_asked
    is_matched = cell.entry.matched and is_met(found.num_asked, found.num_trainable)
    mark = "" if is_matched else UNMATCHED
    return {"weights": f"{found.num_trainable:,}{mark}", "budget": f"{share_of_budget:.0%}"}


def _here(device: str | None, num_processes: int) -> Environment:
    """This machine, as the records of cells run now would describe it."""
    first = first_gpu(device)
    device = "cuda:0" if has_gpu(device) else "cpu"
    here = environment(device, num_processes, first)
    if device == "cpu" and num_processes > 1:
        here = dataclasses.replace(here, num_threads=max(1, here.num_threads // num_processes))
    return here
