"""Two runners on one results folder, in real processes, and what a killed one leaves."""

import os
import signal
import subprocess
import sys

import psutil
import pytest

from suites import record, runner, table
from suites.overrides import override
from suites.plan import plan
from tests.suites.arena import finished, small_suite, still_running

STEPS = 100_000


@pytest.fixture
def start(tmp_path, world_cache):
    """Starts the command on cells that train for hours; what still runs at the end is ended."""
    started = []

    def start():
        arguments = ["small", "--methods", "base,lora", "--seeds", "0", "--steps", str(STEPS)]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.suites.arena", *arguments, "--out", str(tmp_path)],
            env={**os.environ, "SPIEL_CACHE": str(world_cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(process, text):
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"it never said {text!r}")


def test_a_second_runner_leaves_cells_in_work_alone(start, tmp_path):
    first = start()
    wait_for(first, "lora seed 0: train")
    log = tmp_path / "logs" / f"small-steps{STEPS}" / "lora-r2-s0.log"
    with log.open("a") as file:
        file.write("what the first one prints\n")
    second = start()
    printed, told = second.communicate(timeout=120)
    assert "what the first one prints" in log.read_text()
    assert "1 of 2 cells are finished and skipped" in told
    assert "lora seed 0: skipped: being run by another process" in told
    assert second.returncode == 1  # the table is not whole
    assert "lora seed 0 is being run by another process" in printed
    assert "base" in printed

    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    assert still_running(family) == []  # nobody trains on without a runner, holding the lock
    folder = tmp_path / "records" / f"small-steps{STEPS}" / "world"
    assert [path.name for path in folder.iterdir()] == ["base-r2-s0.json"]
    assert record.read(folder / "base-r2-s0.json").status == "ok"


def test_cells_that_another_runner_finished_are_in_the_table(tmp_path, capsys):
    cells = plan(override(small_suite(), steps=STEPS), ["base", "lora"], [0])
    for each in cells:
        record.write(finished(each), each.record_path(tmp_path))
    assert table.present(cells, tmp_path) == 0
    assert "lora" in capsys.readouterr().out


def test_records_of_another_cell_are_not_counted(tmp_path, capsys):
    lora = plan(small_suite(), ["lora"], [0])[0]
    other = plan(override(small_suite(), steps=7), ["lora"], [0])[0]
    record.write(finished(other), lora.record_path(tmp_path))
    assert table.present([lora], tmp_path) == 1
    assert "not counted: " in capsys.readouterr().out


def test_ctrl_c_stops_the_child_and_leaves_the_rest_to_a_second_start(tmp_path, world_cache):
    arguments = ["small", "--methods", "base,lora", "--seeds", "0", "--out", str(tmp_path)]
    environment = {**os.environ, "SPIEL_CACHE": str(world_cache)}
    script = [sys.executable, "-m", "tests.suites.arena"]
    long = subprocess.Popen(
        [*script, *arguments, "--steps", "100000"],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background has them ignore Ctrl-C, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in long.stderr:
        if "lora seed 0: train" in line:
            break
    family = psutil.Process(long.pid).children(recursive=True)
    long.send_signal(signal.SIGINT)
    assert long.wait(timeout=60) == 130
    assert "the same command continues" in long.stderr.read()
    assert still_running(family) == []
    folder = tmp_path / "records" / "small-steps100000" / "world"
    statuses = {path.stem: record.read(path).status for path in folder.iterdir()}
    assert statuses == {"base-r2-s0": "ok", "lora-r2-s0": "interrupted"}
    assert not list(folder.glob(".*"))
    cells = plan(override(small_suite(), steps=100000), ["base", "lora"], [0])
    assert runner.finished(cells, tmp_path) == (cells[:1], [])
