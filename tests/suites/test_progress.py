"""What a person reads while cells run."""

from suites.progress import LineProgress, Report, clock
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


def test_clock():
    assert [clock(s) for s in (None, 5, 65, 3725)] == ["-", "0:05", "1:05", "1:02:05"]


class _Silent:
    """A console that keeps its lines."""

    def __init__(self):
        self.lines = []

    def print(self, text, **options):
        self.lines.append(text)
