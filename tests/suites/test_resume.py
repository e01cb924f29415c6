"""A cell that was killed or stopped goes on from its checkpoint and ends as if it never was."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist
from transformers import Trainer, TrainerState

from suites import cell as cell_module
from suites import record, runner
from suites.checkpoint import HISTORY, Checkpoints, _digests
from suites.distributed import Rank
from suites.embedded import default_cache_dir
from suites.measure import Meter
from suites.methods import METHODS
from suites.overrides import override
from suites.plan import Execution, plan
from suites.progress import LineProgress
from suites.record import PhaseCost
from suites.steps import StepMeter
from suites.suite import Recipe
from tests.suites.arena import ENVIRONMENT, cell, small_suite

NUM_STEPS, KILLED_AT = 50, 33  # between two reselections of SpIEL
EVERY_STEP = Execution(save_seconds=0)


class Silent:
    def print(self, *_, **__):
        pass


class Killer(LineProgress):
    """Kills the cell's process when it says that a step is done."""

    def __init__(self, cells, step=None):
        super().__init__(Silent(), cells)
        self.step = step

    def hear(self, report):
        if self.step and report.step and report.step >= self.step:
            for child in psutil.Process(forkserver._forkserver._forkserver_pid).children():
                child.send_signal(signal.SIGKILL)


@pytest.fixture(autouse=True)
def cache(monkeypatch, world_cache):
    monkeypatch.setenv("SPIEL_CACHE", str(world_cache))
    assert default_cache_dir() == world_cache


def run(of, out, way=EVERY_STEP, killed_at=None):
    runner.run([of], out, way, Killer([of], killed_at))
    return record.read(of.record_path(out))


def trained(method):
    of = cell(method, suite=small_suite(recipe=Recipe(num_steps=NUM_STEPS, batch_size=4)))
    if method == "lora":  # its random state counts too
        options = {**METHODS["lora"].options, "dropout": 0.1}
        of = dataclasses.replace(of, entry=dataclasses.replace(of.entry, options=options))
    return of


def results(found):
    """What may not depend on how often the cell was interrupted."""
    training = found.training
    return training.losses, training.num_tokens, training.first_step_flops, found.size, found.scores


@pytest.mark.parametrize("method", ["lora", "spiel", "full"])
def test_killed_and_resumed_is_as_never_interrupted(method, tmp_path):
    of = trained(method)
    unbroken = run(of, tmp_path / "unbroken", Execution(save_seconds=None))
    assert not (tmp_path / "unbroken" / "checkpoints").exists()

    out = tmp_path / "broken"
    killed = run(of, out, killed_at=KILLED_AT)
    assert (killed.status, "SIGKILL" in killed.reason) == ("failed", True)
    resumed = run(of, out)
    assert resumed.status == "ok"
    (step,) = resumed.training.resumed_at
    assert KILLED_AT - 1 <= step < NUM_STEPS
    assert results(resumed) == results(unbroken)
    assert len(resumed.training.step_seconds) == NUM_STEPS
    assert resumed.training.first_step_flops > 0
    assert resumed.started_at <= killed.ended_at
    assert resumed.phases["train"].seconds > sum(resumed.training.step_seconds)
    assert not (out / "checkpoints").exists()


def start(out, cache, *more):
    """The command on one cell, in a session of its own, as a terminal has it."""
    arguments = ["small", "--methods", "spiel", "--seeds", "0", "--steps", "200", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.suites.arena", *arguments, "--out", str(out)],
        env={**os.environ, "SPIEL_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell that starts tests in the background has them ignore Ctrl-C, and so their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_ctrl_c_and_resumed_is_as_never_interrupted(tmp_path, world_cache):
    of = plan(override(small_suite(), steps=200), ["spiel"], [0])[0]
    out = tmp_path / "broken"
    first = start(out, world_cache, "--save-minutes", "0.0001")  # at every step
    while not list(of.checkpoints(out).glob(f"checkpoint-*/{HISTORY}")):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGINT)  # a terminal sends it to all processes of the command
    _, told = first.communicate(timeout=60)
    assert (first.returncode, "the same command continues" in told) == (130, True)
    stopped = record.read(of.record_path(out))
    assert (stopped.status, stopped.reason) == ("interrupted", "stopped by the user")

    second = start(out, world_cache)
    _, told = second.communicate(timeout=120)
    assert second.returncode == 0, told
    resumed = record.read(of.record_path(out))
    (step,) = resumed.training.resumed_at
    assert 0 < step < 200
    assert results(resumed) == results(run(of, tmp_path / "unbroken", Execution(save_seconds=None)))
    assert not (out / "checkpoints").exists()


def checkpoints(folder, **changes):
    environment = dataclasses.replace(ENVIRONMENT, **changes)
    return Checkpoints(folder, 60.0, environment, "world-1")


def write_history(folder, step, by):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(bytes(100))
    history = dataclasses.replace(by.history, cost=PhaseCost(2.0, 3), folder=None)
    values = {"made_by": by.made_by, "files": _digests(path)}
    values["history"] = dataclasses.asdict(history)
    (path / HISTORY).write_text(json.dumps(values))


def test_the_newest_whole_checkpoint_is_gone_on_from(tmp_path):
    assert checkpoints(tmp_path).history.folder is None
    for step in (9, 10):
        write_history(tmp_path, step, checkpoints(tmp_path))
    (tmp_path / "checkpoint-11").mkdir()  # killed before it was whole
    found = checkpoints(tmp_path).history
    assert found.folder == tmp_path / "checkpoint-10"
    assert found.resumed_at == (9, 10)
    assert found.cost == PhaseCost(2.0, 3)


@pytest.mark.parametrize("changes", [{"cpu": "B"}, {"num_processes": 2}, {"packages": {}}])
def test_what_other_hardware_or_libraries_made_is_not(tmp_path, changes):
    write_history(tmp_path, 9, checkpoints(tmp_path))
    found = checkpoints(tmp_path, **changes)
    assert (found.history.folder, found.passed_over) == (None, [9])


def test_what_other_code_made_is_not_whatever_else_was_committed(tmp_path):
    write_history(tmp_path, 9, checkpoints(tmp_path))
    elsewhere = {"git_revision": "f00", "git_dirty": True, "platform": "another kernel"}
    assert checkpoints(tmp_path, **elsewhere).history.folder == tmp_path / "checkpoint-9"
    assert checkpoints(tmp_path, code_hash="other").history.folder is None


def test_a_damaged_history_is_no_checkpoint(tmp_path):
    write_history(tmp_path, 9, checkpoints(tmp_path))
    os.truncate(tmp_path / "checkpoint-9" / HISTORY, 20)
    assert checkpoints(tmp_path).history.folder is None


def lose(path):
    os.truncate(path, 10)


def overwrite(path):
    path.write_bytes(b"1" * 100)


@pytest.mark.parametrize("damage", [lose, overwrite, Path.unlink])
def test_a_checkpoint_that_lost_data_is_passed_over(tmp_path, damage):
    for step in (9, 10):
        write_history(tmp_path, step, checkpoints(tmp_path))
    damage(tmp_path / "checkpoint-10" / "optimizer.pt")
    assert checkpoints(tmp_path).history.folder == tmp_path / "checkpoint-9"
    damage(tmp_path / "checkpoint-9" / "optimizer.pt")
    assert checkpoints(tmp_path).history.folder is None


def test_a_checkpoint_that_does_not_know_its_files_is_passed_over(tmp_path):
    write_history(tmp_path, 9, checkpoints(tmp_path))
    path = tmp_path / "checkpoint-9" / HISTORY
    values = json.loads(path.read_text())
    del values["files"]
    path.write_text(json.dumps(values))
    assert checkpoints(tmp_path).history.folder is None


def save(saving, step, monkeypatch):
    monkeypatch.setattr(Meter, "cost_so_far", lambda self: PhaseCost(2.0, 3))
    saving.attach(Meter("cpu", lambda phase: None), StepMeter("cpu"))
    saving.on_save(None, TrainerState(global_step=step), None)


def test_a_saved_checkpoint_is_on_the_disk_before_its_history(tmp_path, monkeypatch):
    newest, flushed = tmp_path / "checkpoint-3", []

    def fsync(descriptor):
        flushed.append((os.fstat(descriptor).st_ino, (newest / HISTORY).exists()))

    (newest / "second_adapter").mkdir(parents=True)
    paths = [newest / "optimizer.pt", newest / "second_adapter" / "adapter_config.json"]
    for path in paths:
        path.write_bytes(bytes(5))
    monkeypatch.setattr(os, "fsync", fsync)
    save(checkpoints(tmp_path), 3, monkeypatch)
    assert {(path.stat().st_ino, False) for path in paths} <= set(flushed)
    found = checkpoints(tmp_path).history
    assert (found.folder, found.resumed_at) == (newest, (3,))


def test_ranks_have_written_their_files_before_the_history_is(tmp_path, monkeypatch):
    newest, seen = tmp_path / "checkpoint-3", []
    newest.mkdir()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "barrier", lambda: seen.append((newest / HISTORY).exists()))
    other = Checkpoints(tmp_path, 60.0, ENVIRONMENT, "world-1", is_main=False)
    for each in (checkpoints(tmp_path), other):
        save(each, 3, monkeypatch)
    assert seen == [False, True]


def test_a_checkpoint_that_was_passed_over_stays_until_training_is_past_it(tmp_path, monkeypatch):
    write_history(tmp_path, 5, checkpoints(tmp_path, cpu="another"))
    saving = checkpoints(tmp_path)
    for step, left in {4: [4, 5], 6: [6]}.items():
        write_history(tmp_path, step, saving)
        save(saving, step, monkeypatch)
        found = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
        assert found == [f"checkpoint-{each}" for each in left]


@pytest.mark.parametrize("index", [0, 1])
def test_all_ranks_find_the_checkpoint_of_the_first(index, tmp_path, monkeypatch):
    of = cell()
    monkeypatch.setattr(Rank, "join", lambda self, device: f"cuda:{self.index}")
    monkeypatch.setattr(cell_module.measure, "Meter", lambda device, tell: Meter("cpu", tell))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "A GPU")

    def begin(index, **changes):
        way, rank = Execution(num_processes=2, **changes), Rank(index, 2)
        parts = {"world": None}
        return cell_module.begin(of, None, tmp_path, way, rank, print, parts).checkpoints

    write_history(of.checkpoints(tmp_path), 9, begin(0))
    assert begin(index).history.folder is not None
    assert begin(index, force=True).history.folder is None


def test_force_begins_anew(tmp_path):
    of = trained("lora")
    run(of, tmp_path, killed_at=KILLED_AT)
    assert run(of, tmp_path, Execution(force=True)).training.resumed_at == ()


@pytest.mark.parametrize("fails_in", ["_save_checkpoint", "the history"])
def test_a_checkpoint_that_cannot_be_written_ends_no_training(
    fails_in, tmp_path, world_folder, monkeypatch
):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    if fails_in == "_save_checkpoint":
        monkeypatch.setattr(Trainer, fails_in, refuse)
    else:
        monkeypatch.setattr("suites.checkpoint.write_whole", refuse)
    found = cell_module.run(
        cell("lora", suite=small_suite(recipe=Recipe(num_steps=3, batch_size=4))),
        world_folder,
        tmp_path,
        EVERY_STEP,
        Rank(),
        lambda report: None,
    )
    assert (found.status, len(found.training.losses)) == ("ok", 3)
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_what_another_world_made_is_not_gone_on_from(tmp_path):
    write_history(tmp_path, 9, checkpoints(tmp_path))
    assert Checkpoints(tmp_path, 60.0, ENVIRONMENT, "world-2").history.folder is None
