"""Child processes: one for each cell, so that what kills one leaves the others and the run alone.

A server process imports the libraries once and is forked for every child (`forkserver`), which
saves each of them the imports; it computes nothing itself, so no thread or CUDA context is
inherited. Where the platform has no forkserver, children are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from suites import embedded, record
from suites.plan import Cell
from suites.progress import Report

#: What every cell imports sooner or later; none of it may start threads or touch a GPU.
PRELOADED = (
    "suites.cell",
    "transformers.models.llama.modeling_llama",
    "peft",
    "lm_eval.models.huggingface",
    "lm_eval.tasks",
)


@dataclass(frozen=True)
class Ended:
    """A cell's last word: its record is written."""

    status: str
    reason: str


@dataclass(frozen=True)
class Built:
    """The embedded world lies in `folder`, or could not be made, for `problem`."""

    folder: Path | None
    problem: str = ""


@dataclass(frozen=True)
class Unwritten:
    """The record could not be written."""

    problem: str


def context(log: Path) -> BaseContext:
    """Starts the server process, what it prints going to `log`, or falls back to spawning."""
    # Threads that spin while they wait make each other 10 times slower where cores are shared,
    # and a comparison with them; OpenMP reads this once, when the libraries are loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(list(PRELOADED))
    from multiprocessing import forkserver

    with _output_to(log):
        forkserver.ensure_running()
    return chosen


def run_child(
    chosen: BaseContext,
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    hear: Callable[[Any], None],
) -> int:
    """Runs `target(*arguments, connection)` in a child; `hear` gets each message it sends.

    Returns its exit code, the negative signal number if a signal ended it. Whatever interrupts
    this process stops the child first.
    """
    receiving, sending = chosen.Pipe(duplex=False)
    child = chosen.Process(target=target, args=(*arguments, sending))
    child.start()
    sending.close()
    try:
        while child.is_alive() or receiving.poll():
            wait([receiving, child.sentinel])
            if not _drain(receiving, hear):
                break
        child.join()
    finally:
        _stop(child)
        receiving.close()
    return child.exitcode or 0


def _drain(connection: Connection, hear: Callable[[Any], None]) -> bool:
    """Hears all that waits in `connection`; False once its other end is closed."""
    try:
        while connection.poll():
            hear(connection.recv())
    except EOFError:
        return False
    return True


def _stop(child: BaseProcess) -> None:
    """Ends `child` if it still runs: asks, waits, and insists."""
    if child.is_alive():
        child.terminate()
        child.join(timeout=3)
    if child.is_alive():
        child.kill()
        child.join()


def run_cell(cell: Cell, world: Path | None, out: Path, connection: Connection) -> None:
    """What a cell's child does: trains, evaluates, writes the record, says how it ended."""
    _begin(cell.log_path(out))
    from suites import cell as cell_module

    outcome = cell_module.run(cell, world, connection.send)
    try:
        record.write(outcome, cell.record_path(out))
    except (OSError, ValueError) as error:
        connection.send(Unwritten(str(error)))
        return
    connection.send(Ended(outcome.status, outcome.reason))


def build_world(world: embedded.World, cache: Path, log: Path, connection: Connection) -> None:
    """What the world's child does: finds the embedded world or makes it, and says where."""
    _begin(log)

    def progress(fraction: float, text: str) -> None:
        connection.send(Report(f"embedded world: {text.split(',')[0]}", round(100 * fraction), 100))

    try:
        connection.send(Built(embedded.build(world, cache, progress)))
    except ValueError as error:
        connection.send(Built(None, str(error)))


def _begin(log: Path) -> None:
    """Leaves Ctrl-C to the parent, which ends its children itself, and prints to `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Sends what is printed by a process started inside to `log`; libraries warn as they load."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        yield
    finally:
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
        os.close(descriptor)
