"""What child processes do: one makes the embedded world, one or several train each cell."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from suites import embedded, record
from suites.children import print_to
from suites.distributed import Rank, has_gpu
from suites.messages import Built, Checked, Ended, Lost, Skipped, Unwritten
from suites.plan import Cell, Execution
from suites.progress import Report
from suites.suite import Suite, placed
from suites.world import World


def run_cell(
    cell: Cell, world: Path | None, out: Path, way: Execution, rank: Rank, connection: Connection
) -> None:
    """What a cell's child does: trains, evaluates, writes the record, says how it ended.

    Of several ranks only the main one does more than train. Its lock on the cell lasts as long as
    its process: no other runner works on the cell meanwhile, and none waits for one that died.
    """
    log = cell.log_path(out)
    _begin(log if rank.is_main else log.with_suffix(f".{rank.index}.log"), keep=True)
    rank.show_gpus(cell.suite.device)
    with _only_worker(cell, out, way, rank) as obstacle:
        if obstacle:
            connection.send(Skipped(obstacle))
            return
        if rank.is_main:  # only now: until it has the lock, the log is another runner's
            os.ftruncate(1, 0)
        _work(cell, world, out, way, rank, connection)


def _work(
    cell: Cell, world: Path | None, out: Path, way: Execution, rank: Rank, connection: Connection
) -> None:
    from suites import cell as cell_module

    outcome = cell_module.run(cell, world, out, way, rank, connection.send)
    if not rank.is_main and outcome.status == "ok":
        return
    if not rank.is_main:
        connection.send(Lost(outcome.status, f"rank {rank.index}: {outcome.reason}"))
        sys.exit(1)
    try:
        record.write(outcome, cell.record_path(out))
    except OSError as error:
        connection.send(Unwritten(str(error)))
        return
    if outcome.status in ("ok", "diverged"):  # what else there is may end better another time
        _discard(cell.checkpoints(out))
    connection.send(Ended(outcome.status, outcome.reason))


@contextmanager
def _only_worker(cell: Cell, out: Path, way: Execution, rank: Rank) -> Iterator[str]:
    """Holds the cell's lock; gives why there is nothing to do, or "" if there is."""
    if not rank.is_main:
        yield ""
        return
    from filelock import FileLock, Timeout

    lock = FileLock(cell.lock_path(out))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield "being run by another process"
        return
    with lock:
        if way.force:
            _discard(cell.checkpoints(out))
        # Another runner may have finished it since this one looked.
        is_done = not way.force and _is_finished(cell, out)
        yield "finished by another run" if is_done else ""


def _discard(checkpoints: Path) -> None:
    """Removes a cell's checkpoints, and the folders above if those are empty now."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    with suppress(OSError):
        checkpoints.parent.rmdir()
        checkpoints.parent.parent.rmdir()


def _is_finished(cell: Cell, out: Path) -> bool:
    with suppress(record.DamagedRecordError):  # or there is none
        return record.finishes(record.read(cell.found_path(out)), cell)
    return False


def build_world(world: World, cache: Path, log: Path, connection: Connection) -> None:
    """What the world's child does: finds the embedded world or makes it, and says where."""
    _begin(log)

    def progress(fraction: float, text: str) -> None:
        connection.send(Report(f"embedded world: {text.split(',')[0]}", round(100 * fraction), 100))

    try:
        connection.send(Built(embedded.build(world, cache, progress)))
    except ValueError as error:
        connection.send(Built(None, str(error)))


def check_inputs(
    cells: Sequence[Cell], world: Path | None, log: Path, connection: Connection
) -> None:
    """What a child does before any cell: looks for what must fail in them, and says so."""
    _begin(log)
    from suites import preflight

    suite = placed(cells[0].suite, world)
    try:
        preflight.check_suite(suite)
    except (ValueError, OSError, ImportError) as error:  # which say what is wrong
        connection.send(Checked(str(error).strip() or type(error).__name__))
    else:
        connection.send(Checked(refusals=preflight.refusals(suite, cells)))


def compile_kernels(suite: Suite, log: Path, connection: Connection) -> None:
    """What a child does before any cell of SpIEL: has its kernels for CPUs compiled and kept on
    disk, if cells will want them. The first of them would do it too, and hold the compiler's 100 MB
    ever after, which would count as training's.
    """
    _begin(log)
    if has_gpu(suite.device):  # and SpIEL is not loaded yet
        return
    import torch

    from spiel import ops
    from spiel.ops.optional import CPU_MIN_NUMEL

    if suite.world is None or suite.world.hidden_size**2 >= CPU_MIN_NUMEL:
        ops.settle(torch.device("cpu"), torch.float32, [(CPU_MIN_NUMEL // 100, CPU_MIN_NUMEL)])


def _begin(log: Path, keep: bool = False) -> None:
    """Leaves Ctrl-C to the parent, which ends its children itself, and prints to `log`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    print_to(log, keep)


def _die_with_parent() -> None:
    """Ends this process when its runner was killed: nobody else would, and it holds a lock."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
