"""What a person reads while cells run."""

import dataclasses
import io

import pytest
from rich.console import Console

from suites import progress
from suites.progress import Forecast, LineProgress, Report, clock
from tests.suites.arena import cell


def test_lines_tell_phase_step_loss_and_time_left():
    console = _Silent()
    view = LineProgress(console, [cell("base"), cell()], every_seconds=0)
    view.start_cell(cell("base"))
    view.end_cell(cell("base"), "ok")
    view.start_cell(cell())
    view.hear(Report("train", 2, 4, 1.25))
    assert console.lines[0].startswith("[1/2] base seed 0: ok")
    assert console.lines[1].startswith("[2/2] lora seed 0: train 2/4, loss 1.250, 0:00 left")


def test_bars_show_the_cell_its_step_and_its_loss():
    console = Console(
        file=io.StringIO(), force_terminal=True, width=100, markup=False, highlight=False
    )
    method = "peft:[/a]/adapter_config.json"  # brackets are no markup
    of = dataclasses.replace(cell(), method=method)
    with progress.progress(console, [of]) as view:
        view.start_cell(of)
        view.hear(Report("train", 2, 4, 1.25))
        view.bars.refresh()
        view.end_cell(of, "ok")
    shown = console.file.getvalue()
    assert f"{method} seed 0: train" in shown and "2/4" in shown and "loss 1.250" in shown
    assert f"{method} seed 0: ok, in 0:00" in shown


@pytest.fixture
def passing(monkeypatch):
    """Lets so many seconds pass, of a clock that stands still otherwise."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def let(seconds):
        now[0] += seconds

    return let


@pytest.mark.parametrize("resumed_at", [0, 60])
def test_time_left_is_by_the_steps_and_not_by_the_start(passing, resumed_at):
    cells = [cell(), cell("spiel")]
    forecast = Forecast(cells)
    forecast.start_cell()
    passing(30)  # loading, preparing
    forecast.hear(Report("train", resumed_at + 1, 100))
    assert forecast.seconds_left() is None
    for step in range(resumed_at + 2, resumed_at + 12):
        passing(2)
        forecast.hear(Report("train", step, 100))
    own = 2 * (100 - resumed_at - 11)
    assert forecast.seconds_left() == pytest.approx(own + (30 + 20 + own))


def test_time_left_counts_the_evaluation_once_one_was_seen(passing):
    cells = [cell(), cell(seed=1)]
    forecast = Forecast(cells)
    for each in cells:
        forecast.start_cell()
        for step in (1, 2, 3):
            passing(2)
            forecast.hear(Report("train", step, 3))
        if each.seed == 0:
            passing(50)  # evaluating
            forecast.end_cell(each)
    assert forecast.seconds_left() == pytest.approx(50)


def test_clock():
    assert [clock(s) for s in (None, 5, 65, 3725)] == ["-", "0:05", "1:05", "1:02:05"]


class _Silent:
    """A console that keeps its lines."""

    def __init__(self):
        self.lines = []

    def print(self, text, **options):
        self.lines.append(text)
