"""Child processes, so that what kills one leaves the others and the run alone.

A server process imports the libraries once and is forked for every child (`forkserver`), which
saves each of them the imports (see `suites.libraries`); it computes nothing itself, so no thread
or CUDA context is inherited. Where the platform has no forkserver, children are spawned.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the first is not on every platform
    from multiprocessing.context import ForkServerContext, SpawnContext

    Context = ForkServerContext | SpawnContext

#: What children get to end by themselves before they are ended.
GRACE_SECONDS = 3


def context(log: Path) -> Context:
    """Starts the server process, what it prints going to `log`, or falls back to spawning."""
    # Threads that spin while they wait make each other 10 times slower where cores are shared,
    # and a comparison with them; OpenMP reads this once, when the libraries are loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(["suites.libraries"])
    from multiprocessing import forkserver

    with _output_to(log):
        forkserver.ensure_running()
    return chosen


def run_child(
    chosen: Context,
    target: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    hear: Callable[[Any], None],
) -> int:
    """Runs `target(*each, connection)` in a child for each of `arguments`, all at once.

    `hear` gets every message they send. The first child is the main one: when it ends, or any
    other fails, the rest have GRACE_SECONDS to end too. Returns the exit code of the first that
    failed, the negative signal number if a signal ended it, else 0. Whatever interrupts this
    process stops the children first.
    """
    receiving, sending = chosen.Pipe(duplex=False)
    children = [chosen.Process(target=target, args=(*each, sending)) for each in arguments]
    for child in children:
        child.start()
    sending.close()
    try:
        _listen(children, receiving, hear)
        code = next((child.exitcode for child in children if child.exitcode), 0)
        _await(children, GRACE_SECONDS)
        _drain(receiving, hear)
    finally:
        _stop(children)
        receiving.close()
    return code


def _listen(
    children: Sequence[BaseProcess], connection: Connection, hear: Callable[[Any], None]
) -> None:
    """Hears the children until the main one has ended or another has failed."""
    while children[0].is_alive():
        # Not those that ended well, whose sentinels would wake this all the time.
        running = [child.sentinel for child in children if child.is_alive()]
        if any(child.exitcode for child in children):
            return
        wait([connection, *running])
        if not _drain(connection, hear):
            children[0].join()


def _drain(connection: Connection, hear: Callable[[Any], None]) -> bool:
    """Hears all that waits in `connection`; False once its other end is closed."""
    try:
        while connection.poll():
            hear(connection.recv())
    except EOFError:
        return False
    return True


def _await(children: Sequence[BaseProcess], seconds: float) -> None:
    """Waits until all `children` have ended, `seconds` at most."""
    deadline = time.monotonic() + seconds
    for child in children:
        child.join(timeout=max(0.0, deadline - time.monotonic()))


def _stop(children: Sequence[BaseProcess]) -> None:
    """Ends those of `children` that still run: asks, waits, and insists."""
    for child in children:
        if child.is_alive():
            child.terminate()
    _await(children, GRACE_SECONDS)
    for child in children:
        if child.is_alive():
            child.kill()
            child.join()


def print_to(log: Path, keep: bool = False) -> None:
    """Has all that this process prints go to `log` from now on, libraries' own words included;
    behind what is there, if that is to be kept.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    begin = os.O_APPEND if keep else os.O_TRUNC
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | begin, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


@contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Sends what is printed by a process started inside to `log`; libraries warn as they load."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        print_to(log)
        yield
    finally:
        for number, original in zip((1, 2), kept, strict=True):
            os.dup2(original, number)
            os.close(original)
