"""What a person sees while cells run: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from suites.console import say
from suites.plan import Cell


@dataclass(frozen=True)
class Report:
    """A child's word about itself: the phase it is in and, while it trains, its step and loss."""

    phase: str
    step: int | None = None
    num_steps: int | None = None
    loss: float | None = None

    def __str__(self) -> str:
        text = self.phase
        if self.step is not None:
            text += f" {self.step}/{self.num_steps}"
        return text if self.loss is None else f"{text}, loss {self.loss:.3f}"


class Forecast:
    """How long the rest will take, judged by the cells that are done and the one under way."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.left = list(cells)
        self._seconds: dict[str, list[float]] = {}
        #: From the last step of a cell to its end.
        self._tails: list[float] = []
        self.start_cell()

    def start_cell(self) -> None:
        self._started = time.monotonic()
        #: The first step heard of, which after a checkpoint is not 1, and the last; with times.
        self._first = self._last = (0, self._started)
        self._projected: float | None = None

    def hear(self, report: Report) -> None:
        if not report.step or not report.num_steps:
            return
        self._last = (report.step, time.monotonic())
        if self._first[0] == 0:
            self._first = self._last
        num_steps, seconds = (b - a for a, b in zip(self._first, self._last, strict=True))
        if num_steps:  # so that the first step, and what came before, count once
            to_do = report.num_steps - report.step
            self._projected = self._elapsed() + to_do * seconds / num_steps

    def end_cell(self, cell: Cell) -> float:
        """Seconds that the cell took."""
        seconds = self._elapsed()
        self.left.remove(cell)
        self._seconds.setdefault(cell.method, []).append(seconds)
        if self._last[0]:
            self._tails.append(time.monotonic() - self._last[1])
        return seconds

    def seconds_left(self) -> float | None:
        """Seconds until the last cell ends, or None before anything is known."""
        own = None if self._projected is None else self._projected + _mean(self._tails, 0.0)
        known = [seconds for each in self._seconds.values() for seconds in each]
        if own is not None:
            known.append(own)
        if not known:
            return None
        mean = sum(known) / len(known)
        cells = [_mean(self._seconds.get(cell.method), mean) for cell in self.left]
        cells[0] = own or cells[0]
        return sum(cells[1:]) + max(0.0, cells[0] - self._elapsed())

    def _elapsed(self) -> float:
        return time.monotonic() - self._started


def _mean(values: Sequence[float] | None, otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def clock(seconds: float | None) -> str:
    """`4:05` or `1:02:03`; `-` for None."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress(Protocol):
    """Told of everything in the order it happens; used as a context around a whole run."""

    def __enter__(self) -> Progress: ...
    def __exit__(self, *exception: object) -> None: ...
    def say(self, text: str) -> None: ...
    def prepare(self, report: Report) -> None: ...
    def start_cell(self, cell: Cell) -> None: ...
    def hear(self, report: Report) -> None: ...
    def end_cell(self, cell: Cell, outcome: str) -> None: ...


def title(cell: Cell) -> str:
    tuning = f" lr {cell.tuning.lr:g}" if cell.tuning is not None and cell.split == "dev" else ""
    return f"{cell.method}{tuning} seed {cell.seed}"


class LineProgress:
    """Plain lines, for logs: one when a phase begins, one every few seconds of training."""

    def __init__(self, console: Console, cells: Sequence[Cell], every_seconds: float = 10) -> None:
        self.console, self.total = console, len(cells)
        self.forecast = Forecast(cells)
        self.every_seconds = every_seconds
        self._said = 0.0
        self._phase = ""
        self._title = ""

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def say(self, text: str) -> None:
        say(self.console, text)

    def prepare(self, report: Report) -> None:
        if self._is_news(report):
            self.say(str(report))

    def start_cell(self, cell: Cell) -> None:
        self.forecast.start_cell()
        number = self.total - len(self.forecast.left) + 1
        self._title, self._phase = f"[{number}/{self.total}] {title(cell)}", ""

    def hear(self, report: Report) -> None:
        self.forecast.hear(report)
        if self._is_news(report):
            left = clock(self.forecast.seconds_left())
            self.say(f"{self._title}: {report}, {left} left")

    def end_cell(self, cell: Cell, outcome: str) -> None:
        seconds = self.forecast.end_cell(cell)
        self.say(f"{self._title}: {outcome}, in {clock(seconds)}")

    def _is_news(self, report: Report) -> bool:
        now = time.monotonic()
        if report.phase == self._phase and now - self._said < self.every_seconds:
            return False
        self._phase, self._said = report.phase, now
        return True


class BarProgress:
    """Two live bars on a terminal: all cells, and the one that runs."""

    def __init__(self, console: Console, cells: Sequence[Cell]) -> None:
        self.forecast = Forecast(cells)
        self.bars = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self.all_cells: TaskID = self.bars.add_task("cells", total=len(cells), note="")
        self.one_cell: TaskID = self.bars.add_task("", total=None, note="", visible=False)
        self._title = ""

    def __enter__(self) -> BarProgress:
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        self.bars.console.print(text)

    def prepare(self, report: Report) -> None:
        self._show(report.phase, report)

    def start_cell(self, cell: Cell) -> None:
        self.forecast.start_cell()
        self._title = title(cell)
        self.bars.reset(self.one_cell, total=None, description=self._title, note="start")

    def hear(self, report: Report) -> None:
        self.forecast.hear(report)
        self._show(f"{self._title}: {report.phase}", report)

    def end_cell(self, cell: Cell, outcome: str) -> None:
        seconds = self.forecast.end_cell(cell)
        self.bars.advance(self.all_cells)
        self.say(f"{self._title}: {outcome}, in {clock(seconds)}")

    def _show(self, description: str, report: Report) -> None:
        loss = "" if report.loss is None else f"loss {report.loss:.3f}"
        self.bars.update(
            self.one_cell,
            description=description,
            total=report.num_steps,
            completed=report.step or 0,
            note=loss,
            visible=True,
        )
        left = clock(self.forecast.seconds_left())
        self.bars.update(self.all_cells, note=f"{left} left")


def progress(console: Console, cells: Sequence[Cell]) -> Progress:
    """Bars where `console` is a terminal, lines where it is a file or a pipe."""
    return BarProgress(console, cells) if console.is_terminal else LineProgress(console, cells)
