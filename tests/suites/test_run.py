"""The command: what it answers to good and bad input, and that it never loses a run."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from suites import children, messages, record, run, runner, table, workers
from suites.distributed import Rank
from suites.embedded import default_cache_dir
from suites.methods import METHODS
from suites.plan import Execution, plan, plan_search
from suites.progress import LineProgress
from suites.suite import Tuning
from tests.suites.arena import BROKEN, cell, finished, small_suite


@pytest.fixture
def arena(monkeypatch, world_cache):
    """The small suite and the broken methods in the command's tables, the world in the cache."""
    monkeypatch.setitem(run.SUITES, "small", small_suite())
    for name, entry in BROKEN.items():
        monkeypatch.setitem(METHODS, name, entry)
    monkeypatch.setenv("SPIEL_CACHE", str(world_cache))
    assert default_cache_dir() == world_cache


def command(*arguments, out=None):
    options = [] if out is None else ["--out", str(out)]
    return run.main(["small", *arguments, *options])


BAD_INPUT = [
    (["quikstart"], "unknown suite 'quikstart'; choose from quickstart"),
    ([], "no suite given; choose from quickstart"),
    (["quickstart", "--methods", "lara"], "unknown method 'lara'; choose from lora, "),
    (["quickstart", "--methods", "a,,b"], "'a,,b' has an empty name; allowed: as spiel,lora"),
    (["quickstart", "--seeds", "0,x"], "'x' in '0,x' is not a whole number; allowed: as 0,1,2"),
    (["quickstart", "--seeds", "0,-1"], "'-1' in '0,-1' is not a whole number"),
    (["quickstart", "--seeds", "1,1"], "'1,1' names a seed twice"),
    (["quickstart", "--seeds", str(2**32)], "4294967296 is too large; allowed: below 2**32"),
    (["quickstart", "--seeds", ""], "'' in '' is not a whole number"),
    (["quickstart", "--steps", "0"], "--steps: '0' is not a whole number of at least 1"),
    (["quickstart", "--steps", "many"], "--steps: 'many' is not a whole number"),
    (["quickstart", "--limit", "2.5"], "--limit: '2.5' is not a whole number"),
    (["quickstart", "--limmit", "2"], "unknown argument '--limmit'; nearest: --limit, "),
    (["quickstart", "--seed", "2"], "unknown argument '--seed'; nearest: --seeds, "),
    (["quickstart", "--dtype", "int3"], "--dtype: invalid choice: 'int3' (choose from 'float32'"),
    (
        ["quickstart", "--quantize", "2bit"],
        "invalid choice: '2bit' (choose from '4bit'",
    ),
    (["quickstart", "--budget", "many"], "budget 'many' is unknown; allowed: r64 (as many weights"),
    (["quickstart", "--budget", "r0"], "lora_rank must be positive, got 0"),
    (["quickstart", "--seq-len", "-1"], "--seq-len: '-1' is not a whole number of at least 1"),
    (["quickstart", "--device", "tpu"], "--device: 'tpu' is not one of cpu, cuda, cuda:N"),
    (["quickstart", "--processes", "0"], "--processes: '0' is not a whole number of at least 1"),
    (["quickstart", "--save-minutes", "-1"], "--save-minutes: '-1' is not a number of minutes"),
    (["quickstart", "--model", ""], "--model: '' is no value"),
    (["quickstart", "--tasks", "gsm8k"], "--tasks: 'gsm8k' is no task of quickstart, which has "),
    (["quickstart", "--tasks", "a:acc:goal"], "--tasks: role 'goal' in 'a:acc:goal' is not one of"),
    (["quickstart", "--methods", "peft:no.json"], "no.json"),
    (["quickstart", "--search", "--methods", "base"], "nothing to search: base does not train"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT)
def test_bad_input_is_one_line_and_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_list_names_suites_and_methods(capsys):
    assert run.main(["--list"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("quickstart", "base", "full", "lora", "spiel"))


@pytest.mark.parametrize("flag", ["--help", "--list"])
def test_help_and_list_answer_at_once(flag):
    # Seconds depend on the machine; what must not be imported does not.
    script = (
        "import sys\nfrom suites import run\n"
        f"try:\n    run.main(['{flag}'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'peft', 'pandas', 'scipy'} & set(sys.modules)))"
    )
    start = time.monotonic()
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines()[-1] == "[]"
    assert time.monotonic() - start < 2


def test_unwritable_results_folder_stops_before_training(arena, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert command("--methods", "base", out=blocked / "results") == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert f"the results folder {blocked / 'results'} cannot be written" in lines[0]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_folder_that_takes_no_file_is_named(tmp_path, monkeypatch, code):
    def refuse(**options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(runner.tempfile, "TemporaryFile", refuse)
    with pytest.raises(runner.NotReadyError, match=os.strerror(code)):
        runner.check_folder(tmp_path, [cell()])


def test_lack_of_disk_space_is_named(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(runner.NotReadyError, match="1 MiB of disk space left, 64 MiB are needed"):
        runner.check_folder(tmp_path, [cell()])


def test_a_file_is_no_results_folder(arena, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert command("--methods", "base", out=tmp_path / "file") == 2
    assert "file is a file; allowed: a folder" in capsys.readouterr().err
    assert command("--methods", "base", out=tmp_path / ("long" * 100)) == 2
    assert "cannot be written: File name too long" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["test", "dev"])
def test_a_task_that_cannot_be_asked_stops_before_training(
    arena, tmp_path, monkeypatch, capsys, split
):
    tasks = [
        dataclasses.replace(task, metric="acc,nome") if task.split == split else task
        for task in small_suite().tasks
    ]
    monkeypatch.setitem(run.SUITES, "small", small_suite(tasks=tuple(tasks)))
    assert command("--methods", "lora", "--seeds", "0", out=tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"error: task world_\w+ has no metric 'acc,nome'; it has: acc,none$", told)
    assert not (tmp_path / "records").exists()


def test_a_broken_row_stops_before_training(arena, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 1, "completion": "b"}\n')
    out = tmp_path / "results"
    assert command("--methods", "lora", "--data", str(data), out=out) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"error: {data}, line 2: field 'prompt' must be a string, got int"
    assert not (out / "records").exists()


def test_training_too_short_for_spiel_stops_before_training(arena, tmp_path, capsys):
    assert command("--methods", "spiel", out=tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "spiel is trained for at least 6 steps, got 3: --steps, or the suite's" in told


def test_a_budget_that_no_method_can_have_stops_before_training(arena, tmp_path, capsys):
    asked = ("--budget", "50000000", "--steps", "6")
    assert command("--methods", "lora,spiel", *asked, out=tmp_path) == 2
    told = capsys.readouterr().err.splitlines()[-2:]
    assert told[0].startswith("error: lora cannot have 50000000 weights")
    assert told[1].startswith("spiel-ag cannot have 50000000 weights")
    assert not (tmp_path / "records").exists()


def test_a_method_that_cannot_have_the_budget_leaves_the_others_alone(arena, tmp_path, capsys):
    asked = ("--budget", "50000000", "--seeds", "0")
    assert command("--methods", "base,lora", *asked, out=tmp_path) == 1
    told = capsys.readouterr().err
    assert "will fail: lora cannot have 50000000 weights" in told
    assert {path.name for path in (tmp_path / "records").rglob("*.json")} == {
        "base-50000000-s0.json",
        "lora-50000000-s0.json",
    }
    capsys.readouterr()
    assert command("--methods", "base,lora", *asked, out=tmp_path) == 1
    again = capsys.readouterr()
    assert "1 of 2 cells are finished and skipped" in again.err
    assert "│ base" in again.out and "│ lora" in again.out


def test_finished_cells_by_other_code_are_told(arena, tmp_path, capsys):
    assert command("--methods", "base", "--seeds", "0", out=tmp_path) == 0
    assert command("--methods", "base", "--seeds", "0,1", out=tmp_path) == 0
    assert "by other code" not in capsys.readouterr().err
    path = next((tmp_path / "records").rglob("base-r2-s0.json"))
    found = record.read(path)
    environment = dataclasses.replace(found.environment, code_hash="other")
    record.write(dataclasses.replace(found, environment=environment), path)
    assert command("--methods", "base", "--seeds", "0,1,2", out=tmp_path) == 0
    told = "finished by other code than there is now, and in the same table: base-r2-s0"
    assert told in capsys.readouterr().err.splitlines()


def test_a_search_goes_on_to_the_picks_of_the_methods_that_can_have_the_budget(arena, tmp_path):
    asked = ("--methods", "full,lora", "--budget", "50000000", "--seeds", "0")
    assert command(*asked, "--search-only", out=tmp_path) == 1
    assert command(*asked, "--search", "--keep-artifacts", out=tmp_path) == 1
    records = (tmp_path / "records").rglob("*.json")
    finals = [path.name for path in records if path.parent.name != "search"]
    assert [name.partition("-")[0] for name in finals] == ["full"]
    assert len(list((tmp_path / "artifacts" / "small-budget-50000000").iterdir())) == 1


def test_adapters_are_kept_if_asked_for(arena, tmp_path, capsys):
    few = ("--methods", "lora", "--seeds", "0")
    assert command(*few, out=tmp_path) == 0
    assert not (tmp_path / "artifacts").exists()
    capsys.readouterr()
    assert command(*few, "--keep-artifacts", out=tmp_path) == 1
    assert "no artifact was kept of lora-r2-s0; --force runs" in capsys.readouterr().err
    assert command(*few, "--keep-artifacts", "--force", out=tmp_path) == 0
    found = record.read(next((tmp_path / "records").rglob("*.json")))
    kept, size = tmp_path / "artifacts" / "small" / f"lora-r2-s0-{found.cell_hash}", found.size
    assert size.artifact_bytes == sum(each.stat().st_size for each in kept.iterdir())
    assert (kept / "adapter_model.safetensors").exists()


def test_failing_cells_leave_the_others_alone(arena, tmp_path, capsys):
    assert command("--methods", "raising,dying,base", "--seeds", "0", out=tmp_path) == 1
    folder = tmp_path / "records" / "small" / "world"
    found = {path.stem: record.read(path) for path in folder.iterdir()}
    assert {name: each.status for name, each in found.items()} == {
        "raising-r2-s0": "failed",
        "dying-r2-s0": "failed",
        "base-r2-s0": "ok",
    }
    assert found["raising-r2-s0"].reason == "RuntimeError: no such luck"
    assert "killed by SIGKILL" in found["dying-r2-s0"].reason
    assert "no such luck" in (tmp_path / "logs" / "small" / "raising-r2-s0.log").read_text()
    shown = " ".join(capsys.readouterr().out.split())
    assert "raising: seed 0 failed: RuntimeError: no such luck" in shown


def test_second_start_skips_what_is_finished(arena, tmp_path, capsys):
    cells = plan(small_suite(), ["base", "lora"], [0, 1])
    for each in cells:
        record.write(finished(each), each.record_path(tmp_path))
    before = [each.record_path(tmp_path).stat().st_mtime_ns for each in cells]
    assert command("--methods", "base,lora", out=tmp_path) == 0
    assert "4 of 4 cells are finished" in capsys.readouterr().err
    assert [each.record_path(tmp_path).stat().st_mtime_ns for each in cells] == before


def test_search_runs_its_picks(arena, tmp_path, capsys):
    arguments = ["--methods", "base,lora", "--seeds", "0", "--limit", "4", "--save-minutes", "0"]
    assert command("--search", *arguments, out=tmp_path) == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "records" / "small-limit4" / "world"
    trials = {path.stem: record.read(path) for path in (folder / "search").iterdir()}
    assert {each.split for each in trials.values()} == {"dev"}
    assert len(trials) == 2
    runs = {path.stem: record.read(path) for path in folder.glob("*.json")}
    assert {each.split for each in runs.values()} == {"test"}
    assert set(runs) >= {"base-r2-s0"} and len(runs) == 2
    assert "quality" in printed
    assert command("--search-only", *arguments, out=tmp_path) == 0
    assert "quality" not in capsys.readouterr().out


def test_search_goes_on_without_a_method_whose_trials_are_not_done(arena, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(runner, "run", lambda cells, *_, **__: ran.extend(cells))
    trials = plan_search(small_suite(), ["full", "lora"], [0])
    for each in trials[:-1]:
        record.write(finished(each), each.record_path(tmp_path))
    assert command("--search", "--methods", "full,lora", "--seeds", "0", out=tmp_path) == 1
    assert [(each.method, each.split) for each in ran] == [("lora", "dev"), ("full", "test")]
    ran.clear()
    assert command("--search", "--methods", "lora", "--seeds", "0", out=tmp_path) == 1
    assert [(each.method, each.split) for each in ran] == [("lora", "dev")]


def test_what_is_not_ok_or_not_the_same_is_run_again(tmp_path):
    done, failed, other, missing = (cell(seed=seed) for seed in range(4))
    record.write(finished(done), done.record_path(tmp_path))
    failure = record.Record.of(failed, "interrupted", "", record.now())
    record.write(failure, failed.record_path(tmp_path))
    record.write(finished(cell("full", seed=2)), other.record_path(tmp_path))
    told = f"{other.record_path(tmp_path)}: of other settings, data or embedded world"
    assert runner.finished([done, failed, other, missing], tmp_path) == ([done], [told])


def test_a_cell_of_another_world_is_run_again(tmp_path):
    """New ones could not be compared with it."""
    of = cell()
    record.write(finished(of, world="world-of-other-libraries"), of.record_path(tmp_path))
    assert runner.finished([of], tmp_path)[0] == []


def test_damaged_record_is_named_and_run_again(arena, tmp_path, capsys):
    damaged = cell("base").record_path(tmp_path)
    damaged.parent.mkdir(parents=True)
    damaged.write_text('{"schema_version": 1, "status"')
    assert command("--methods", "base", "--seeds", "0", out=tmp_path) == 0
    assert f"not counted, and run again: {damaged}" in capsys.readouterr().err
    assert record.read(damaged).status == "ok"


def test_full_disk_while_writing_stops_the_run(tmp_path, monkeypatch):
    view = LineProgress(_Silent(), [cell("base")])
    view.start_cell(cell("base"))

    def child(chosen, target, arguments, hear):
        hear(messages.Unwritten("[Errno 28] No space left on device"))
        return 0

    monkeypatch.setattr(children, "run_child", child)
    with pytest.raises(runner.UnwrittenError, match=r"base-r2-s0\.json cannot be .* No space"):
        runner._run_one(cell("base"), None, tmp_path, Execution(), None, view)


def test_child_that_cannot_write_says_so(tmp_path, monkeypatch, world_folder):
    def no_space(found, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sent = []
    connection = type("Connection", (), {"send": staticmethod(sent.append)})
    monkeypatch.setattr(record, "write", no_space)
    monkeypatch.setattr(workers, "_begin", lambda log, keep: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which it changes for all its process
    workers.run_cell(cell("base"), world_folder, tmp_path, Execution(), Rank(), connection)
    assert isinstance(sent[-1], messages.Unwritten)
    assert "No space left" in sent[-1].problem


def test_a_fault_of_the_record_is_no_full_disk(tmp_path, monkeypatch, world_folder):
    def refuse(found, path):
        raise ValueError("Out of range float values are not JSON compliant: nan")

    sent = []
    connection = type("Connection", (), {"send": staticmethod(sent.append)})
    monkeypatch.setattr(record, "write", refuse)
    monkeypatch.setattr(workers, "_begin", lambda log, keep: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which it changes for all its process
    with pytest.raises(ValueError, match="JSON"):  # ends the child: the runner records that
        workers.run_cell(cell("base"), world_folder, tmp_path, Execution(), Rank(), connection)
    assert not any(isinstance(word, messages.Unwritten) for word in sent)


def test_interruption_keeps_a_finished_record(tmp_path):
    before = finished(cell())
    record.write(before, cell().record_path(tmp_path))
    runner._note_interruption(cell(), tmp_path, record.now())
    assert record.read(cell().record_path(tmp_path)) == before


def test_death_is_called_out_of_memory_only_where_that_is_known(monkeypatch):
    monkeypatch.setattr(runner, "_num_killed_for_memory", lambda: 4)
    assert runner._death(-signal.SIGKILL, killed_before=4)[0] == "failed"
    assert runner._death(-signal.SIGKILL, killed_before=3)[0] == "oom"
    assert runner._death(3, killed_before=3) == ("failed", "its process ended with exit code 3")


class _Silent:
    """A console that keeps its lines."""

    def __init__(self):
        self.lines = []

    def print(self, text, **options):
        self.lines.append(text)


def test_picks_that_become_the_suites_own_are_not_run_again(tmp_path):
    picked = Tuning(lr=0.5)
    (at_pick,) = plan(small_suite(), ["lora"], [0], {"lora": picked})
    record.write(finished(at_pick), at_pick.record_path(tmp_path))
    own, other = (
        plan(small_suite(tunings={"lora": tuning}), ["lora"], [0])[0]
        for tuning in (picked, Tuning(lr=0.25))
    )
    assert runner.finished([own], tmp_path) == ([own], [])
    assert table.load([own], tmp_path) == ([record.read(at_pick.record_path(tmp_path))], [])
    assert runner.finished([other], tmp_path) == ([], [])
    record.write(finished(own, target=0.25), own.record_path(tmp_path))
    assert table.load([own], tmp_path)[0][0].scores["t"].value == 0.25


def test_a_report_runs_nothing(arena, tmp_path, capsys):
    (done,) = plan(small_suite(), ["lora"], [0])
    record.write(finished(done), done.record_path(tmp_path))
    arguments = ("--methods", "lora,full", "--seeds", "0", "--report")
    assert command(*arguments, out=tmp_path) == 1
    printed = capsys.readouterr().out
    assert "│ lora   │   1/1 │" in printed and "│ full   │   0/1 │" in printed
    assert len(list((tmp_path / "records").rglob("*.json"))) == 1
