"""Runs a plan: checks first, then one child after another, whatever becomes of each."""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from suites import embedded, record, workers
from suites.plan import Cell
from suites.progress import Progress, Report
from suites.record import DamagedRecordError, Record

#: Below this much free space a run is not begun: records, logs and tables need a few megabytes.
NEEDED_BYTES = 64 * 2**20


class NotReadyError(Exception):
    """Nothing can be run; the message says what is missing."""


class UnwrittenError(OSError):
    """A record could not be written, so going on would only lose more work."""


def check_folder(out: Path) -> None:
    """Raises NotReadyError unless files can be written in `out`, which is made if it is missing."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"\0")
        free_bytes = shutil.disk_usage(out).free
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotReadyError(f"the results folder {out} cannot be written: {reason}") from error
    if free_bytes < NEEDED_BYTES:
        raise NotReadyError(
            f"the results folder {out} has {free_bytes / 2**20:.0f} MiB of disk space left, "
            f"{NEEDED_BYTES / 2**20:.0f} MiB are needed"
        )


def finished(cells: Sequence[Cell], out: Path) -> tuple[list[Cell], list[str]]:
    """The cells whose record is there and ok, and the damaged records, each with what is wrong."""
    done, damaged = [], []
    for cell in cells:
        path = cell.record_path(out)
        try:
            if path.exists() and is_finished(record.read(path), cell):
                done.append(cell)
        except DamagedRecordError as error:
            damaged.append(str(error))
    return done, damaged


def is_finished(found: Record, cell: Cell) -> bool:
    return found.status == "ok" and found.cell_hash == cell.hash


def run(cells: Sequence[Cell], out: Path, view: Progress) -> None:
    """Runs `cells`, which are of one suite, in order; each leaves a record in `out`.

    Raises UnwrittenError when a record cannot be written, NotReadyError when the suite's world
    cannot, and KeyboardInterrupt when stopped, after its child has been.
    """
    view.say("loading the libraries")
    chosen = workers.context(out / "logs" / "libraries.log")
    made_up = cells[0].suite.world
    world = None if made_up is None else _build_world(made_up, out, chosen, view)
    for cell in cells:
        view.start_cell(cell)
        status, reason = _run_one(cell, world, out, chosen, view)
        view.end_cell(cell, f"{status}: {reason}" if reason else status)


def _build_world(world: embedded.World, out: Path, chosen: BaseContext, view: Progress) -> Path:
    built: list[workers.Built] = []

    def hear(message: Any) -> None:
        if isinstance(message, Report):
            view.prepare(message)
        else:
            built.append(message)

    log = out / "logs" / "world.log"
    arguments = (world, embedded.default_cache_dir(), log)
    code = workers.run_child(chosen, workers.build_world, arguments, hear)
    if not built:
        raise NotReadyError(f"the embedded world was not made: {_death(code)[1]}; see {log}")
    if built[0].folder is None:
        raise NotReadyError(built[0].problem)
    return built[0].folder


def _run_one(
    cell: Cell, world: Path | None, out: Path, chosen: BaseContext, view: Progress
) -> tuple[str, str]:
    """Status and reason of `cell`; where its child could write no record, this writes one."""
    last_words: list[Any] = []

    def hear(message: Any) -> None:
        if isinstance(message, Report):
            view.hear(message)
        else:
            last_words.append(message)

    started_at, killed_before = record.now(), _num_killed_for_memory()
    try:
        code = workers.run_child(chosen, workers.run_cell, (cell, world, out), hear)
    except KeyboardInterrupt:
        if not last_words:
            _note_interruption(cell, out, started_at)
        raise
    match last_words:
        case [workers.Ended(status, reason)]:
            return status, reason
        case [workers.Unwritten(problem)]:
            raise UnwrittenError(f"{cell.record_path(out)} cannot be written: {problem}")
    status, reason = _death(code, _num_killed_for_memory() > killed_before)
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


def _death(code: int, short_of_memory: bool = False) -> tuple[str, str]:
    """Status and reason of a child that ended with exit code `code` before its last word."""
    if code >= 0:
        return "failed", f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL and short_of_memory:
        return "oom", f"its process was killed by {name}, the system being short of memory"
    return "failed", f"its process was killed by {name}"


def _num_killed_for_memory() -> int:
    """How many processes Linux has killed since it started because memory was short."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
