"""Runs a plan: checks first, then one child after another, whatever becomes of each."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from suites import children, distributed, embedded, inputs, messages, record, workers
from suites.hub import MISSING, missing_from_hub
from suites.plan import Cell, Execution
from suites.progress import Progress, Report
from suites.record import DamagedRecordError, Record
from suites.suite import Suite
from suites.world import World

#: Below this much free space a run is not begun: records, logs and tables need a few megabytes.
NEEDED_BYTES = 64 * 2**20


class NotReadyError(Exception):
    """Nothing can be run; the message says what is missing."""


class UnwrittenError(OSError):
    """A record could not be written, so going on would only lose more work."""


def check_folder(out: Path, cells: Sequence[Cell]) -> None:
    """Raises NotReadyError unless files can be written in `out`, which is made if it is missing,
    and would not change what `cells`, all of one suite, are known by.
    """
    for folder in inputs.folders(cells[0].suite) if cells else ():
        if out.resolve().is_relative_to(folder.resolve()):
            raise NotReadyError(
                f"the results folder {out} lies in {folder}, which the suite reads, and whose "
                "files tell its cells from others; allowed: an --out outside of it"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0")
        free_bytes = shutil.disk_usage(out).free
    except FileExistsError as error:
        raise NotReadyError(f"the results folder {out} is a file; allowed: a folder") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotReadyError(f"the results folder {out} cannot be written: {reason}") from error
    if free_bytes < NEEDED_BYTES:
        raise NotReadyError(
            f"the results folder {out} has {free_bytes / 2**20:.0f} MiB of disk space left, "
            f"{NEEDED_BYTES / 2**20:.0f} MiB are needed"
        )


def finished(cells: Sequence[Cell], out: Path) -> tuple[list[Cell], list[str]]:
    """The cells whose record is there and ok, and the records that do not count, each with why."""
    done, others = [], []
    with inputs.unchanged():
        for cell in cells:
            path = cell.found_path(out)
            if not path.exists():
                continue
            try:
                found = record.read(path)
            except DamagedRecordError as error:
                others.append(str(error))
                continue
            if record.finishes(found, cell):
                done.append(cell)
            elif found.status == "ok":
                others.append(f"{path}: of other settings, data or embedded world")
    return done, others


def of_other_code(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """Those of the finished `cells` that were made by other code than there is now."""
    from suites.provenance import code_hash

    here, others = code_hash(), []
    for cell in cells:
        environment = record.read(cell.found_path(out)).environment
        if environment is not None and environment.code_hash not in ("", here):
            others.append(cell)
    return others


def without_artifact(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The finished cells of `cells` of whose training nothing was kept."""
    done = [cell for cell in cells if cell.entry.trains and cell.split == "test"]
    done = finished(done, out)[0]
    return [cell for cell in done if not cell.artifact_path(out).is_dir()]


def run(
    cells: Sequence[Cell], out: Path, way: Execution, view: Progress, others_are_done: bool = False
) -> None:
    """Runs `cells`, which are of one suite, in order; each leaves a record in `out`.

    Cells that another runner works on are left to it. `others_are_done` if these are the rest of
    more cells.

    Raises UnwrittenError when a record cannot be written, NotReadyError when the suite's world
    cannot be made or no cell can succeed, and KeyboardInterrupt when stopped, after its child has
    been.
    """
    suite = cells[0].suite
    _check_machine(suite, way)
    _check_hub(suite)
    if suite.cpu_note and not distributed.has_gpu(suite.device):
        view.say(f"{suite.name} without a GPU: {suite.cpu_note}")
    view.say("loading the libraries")
    chosen = children.context(out / "logs" / "libraries.log")
    made_up = suite.world
    world = None if made_up is None else _build_world(made_up, out, chosen, view)
    refusals = _refusals(cells, world, out, chosen, view)
    if not others_are_done and refusals.keys() == {cell.method for cell in cells}:
        raise NotReadyError("\n".join(refusals.values()))
    for why in refusals.values():
        view.say(f"will fail: {why}")
    if any(cell.entry.entry_point.startswith("spiel.") for cell in cells):
        arguments = (suite, out / "logs" / "kernels.log")
        children.run_child(chosen, workers.compile_kernels, [arguments], view.say)
    for cell in cells:
        view.start_cell(cell)
        status, reason = _run_one(cell, world, out, way, chosen, view)
        view.end_cell(cell, f"{status}: {reason}" if reason else status)


def _check_machine(suite: Suite, way: Execution) -> None:
    """Raises NotReadyError for a device or a number of processes that cannot be."""
    recipe = suite.recipe
    try:
        distributed.share(recipe.batch_size, recipe.gradient_accumulation_steps, way.num_processes)
        if suite.device not in (None, "cpu") or way.num_processes > 1:  # this imports torch
            distributed.check_device(suite.device, way.num_processes)
    except ValueError as error:
        raise NotReadyError(str(error)) from error


def _check_hub(suite: Suite) -> None:
    """Raises NotReadyError for what the suite needs from the hub and cannot have."""
    try:
        missing = missing_from_hub(suite)
    except ValueError as error:
        raise NotReadyError(str(error)) from error
    if missing:
        raise NotReadyError("\n".join([MISSING, *missing]))


def _build_world(world: World, out: Path, chosen: children.Context, view: Progress) -> Path:
    built: list[workers.Built] = []

    def hear(message: Any) -> None:
        if isinstance(message, Report):
            view.prepare(message)
        else:
            built.append(message)

    log = out / "logs" / "world.log"
    arguments = (world, embedded.default_cache_dir(), log)
    killed_before = _num_killed_for_memory()
    code = children.run_child(chosen, workers.build_world, [arguments], hear)
    if not built:
        reason = _death(code, killed_before)[1]
        raise NotReadyError(f"the embedded world was not made: {reason}; see {log}")
    if built[0].folder is None:
        raise NotReadyError(built[0].problem)
    return built[0].folder


def _refusals(
    cells: Sequence[Cell], world: Path | None, out: Path, chosen: children.Context, view: Progress
) -> Mapping[str, str]:
    """The methods whose cells will fail -> why; NotReadyError for what would fail in every cell."""
    heard: list[messages.Checked] = []
    view.say("checking tasks, data and sizes")
    log = out / "logs" / "inputs.log"
    children.run_child(chosen, workers.check_inputs, [(cells, world, log)], heard.append)
    if not heard:
        view.say(f"tasks, data and sizes could not be checked before training; see {log}")
        return {}
    (checked,) = heard
    if checked.problem:
        raise NotReadyError(checked.problem)
    return checked.refusals


def _run_one(
    cell: Cell,
    world: Path | None,
    out: Path,
    way: Execution,
    chosen: children.Context,
    view: Progress,
) -> tuple[str, str]:
    """Status and reason of `cell`; where its child could write no record, this writes one."""
    last_words: list[Any] = []

    def hear(message: Any) -> None:
        if isinstance(message, Report):
            view.hear(message)
        else:
            last_words.append(message)

    started_at, killed_before = record.now(), _num_killed_for_memory()
    arguments = [(cell, world, out, way, rank) for rank in distributed.ranks(way.num_processes)]
    try:
        code = children.run_child(chosen, workers.run_cell, arguments, hear)
    except KeyboardInterrupt:
        if not last_words:
            _note_interruption(cell, out, started_at)
        raise
    if last_words and not any(isinstance(word, messages.Lost) for word in last_words):
        return _heard(cell, out, last_words[0])
    return _note_death(cell, out, started_at, last_words, _death(code, killed_before))


def _heard(cell: Cell, out: Path, word: Any) -> tuple[str, str]:
    """Status and reason by the last word of the cell's child."""
    if isinstance(word, messages.Unwritten):
        raise UnwrittenError(f"{cell.record_path(out)} cannot be written: {word.problem}")
    if isinstance(word, messages.Skipped):
        return "skipped", word.reason
    return word.status, word.reason


def _note_death(
    cell: Cell, out: Path, started_at: str, last_words: Sequence[Any], death: tuple[str, str]
) -> tuple[str, str]:
    """Records that the cell's processes died, or what one of its ranks died of."""
    lost = next((word for word in last_words if isinstance(word, messages.Lost)), None)
    ended = next((word for word in last_words if isinstance(word, messages.Ended)), None)
    if ended and ended.status == "diverged":  # so did the others, and its record has the losses
        return ended.status, ended.reason
    status, reason = (lost.status, lost.reason) if lost else death
    reason += f"; see {cell.log_path(out)}"
    try:
        record.write(Record.of(cell, status, reason, started_at), cell.record_path(out))
    except OSError as error:
        raise UnwrittenError(f"{cell.record_path(out)} cannot be written: {error}") from error
    return status, reason


def _note_interruption(cell: Cell, out: Path, started_at: str) -> None:
    """Records that `cell` was interrupted, unless a finished record would be lost by that."""
    if finished([cell], out)[0]:
        return
    interrupted = Record.of(cell, "interrupted", "stopped by the user", started_at)
    with contextlib.suppress(OSError):
        record.write(interrupted, cell.record_path(out))


def _death(code: int, killed_before: int) -> tuple[str, str]:
    """Status and reason of a child that ended with exit code `code` before its last word.

    `killed_before` is `_num_killed_for_memory()` from before it started.
    """
    if code >= 0:
        return "failed", f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL and _num_killed_for_memory() > killed_before:
        return "oom", f"its process was killed by {name}, the system being short of memory"
    return "failed", f"its process was killed by {name}"


def _num_killed_for_memory() -> int:
    """How many processes Linux has killed since it started because memory was short."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
