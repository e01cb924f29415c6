"""One cell in this process, from the world's files to its record."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from spiel import ops
from suites import catalog, record
from suites import cell as cell_module
from suites.distributed import Rank
from suites.plan import Execution
from suites.steps import StepMeter
from suites.suite import Recipe, Task
from suites.train import DivergedError, LossWatch
from tests.suites.arena import cell, small_suite


@pytest.fixture(scope="module")
def run_small(world_folder, tmp_path_factory):
    def run(method, **changes):
        reports = []
        out, way = tmp_path_factory.mktemp("out"), Execution(save_seconds=None)
        of = cell(method, **changes)
        found = cell_module.run(of, world_folder, out, way, Rank(), reports.append)
        return found, reports

    return run


@pytest.fixture(scope="module")
def lora(run_small):
    return run_small("lora")


def test_the_record_tells_everything(lora, tmp_path):
    found, _ = lora
    assert (found.status, found.reason) == ("ok", "")
    assert found.size.num_trainable == found.size.num_asked
    assert found.size.matched
    config = found.size.adapter_config
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 4)
    assert config["target_modules"] == sorted(catalog.LLAMA_PROJECTIONS)
    assert found.size.saved_for_backward_bytes > 0
    assert found.size.optimizer_state_bytes > 2 * 4 * found.size.num_trainable
    assert found.size.artifact_bytes > 4 * found.size.num_trainable
    assert set(found.phases) == {"load", "prepare", "train", "evaluate"}
    assert len(found.training.losses) == len(found.training.step_seconds) == 3
    assert found.training.num_tokens > 0
    optimizer = found.training.optimizer
    assert optimizer["class"] == "torch.optim.adamw.AdamW"
    assert (optimizer["betas"], optimizer["eps"], optimizer["lr"]) == ([0.9, 0.999], 1e-8, 1e-3)
    assert set(found.scores) == {"world_target", "world_retention"}
    score = found.scores["world_target"]
    assert score.value == pytest.approx(sum(score.per_item) / score.num_items)
    assert found.environment.packages["torch"]
    assert set(found.loaded) == {"attention", "model weights", "training data"}
    record.write(found, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == found


def test_progress_is_reported(lora):
    _, reports = lora
    assert list(dict.fromkeys(report.phase for report in reports)) == [
        "load",
        "prepare",
        "train",
        "evaluate",
        "evaluate world_target",
        "evaluate world_retention",
    ]
    steps = [report for report in reports if report.step]
    assert [(report.step, report.num_steps) for report in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(math.isfinite(report.loss) for report in steps)


def test_the_record_names_the_ops_that_spiel_ran_on(run_small):
    ops.backend_calls["reference"] += 1  # by something else in this process
    suite = small_suite(recipe=Recipe(num_steps=6, batch_size=4))
    found, _ = run_small("spiel", suite=suite)
    assert found.status == "ok", found.reason
    assert found.backend is not None
    assert set(found.backend.split(", ")) <= {"sampled", "blocked"}


def test_methods_load_the_same_and_other_data_are_told(lora, run_small, world_folder, tmp_path):
    assert run_small("base")[0].loaded == lora[0].loaded
    lines = (world_folder / "data" / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(lines[1:]))
    data = dataclasses.replace(small_suite().data, path=str(tmp_path / "fewer.jsonl"))
    fewer = run_small("base", suite=small_suite(data=data))[0].loaded
    assert {name for name in fewer if fewer[name] != lora[0].loaded[name]} == {"training data"}


def test_a_shapes_random_weights_are_not_told_apart(run_small):
    suite = dataclasses.replace(catalog.SUITES["footprint_tiny"], world=None)
    suite = dataclasses.replace(suite, recipe=Recipe(num_steps=2, batch_size=1))
    found, _ = run_small("lora", suite=suite)
    assert found.loaded == {"attention": "sdpa"}


def test_base_does_not_train(run_small):
    found, _ = run_small("base")
    assert found.status == "ok"
    assert found.training.losses == ()
    assert "train" not in found.phases
    assert (found.size.num_trainable, found.size.matched) == (0, False)


def test_full_trains_every_weight_and_is_unmatched(run_small):
    found, _ = run_small("full")
    assert found.size.num_trainable == found.size.num_weights
    assert (found.size.num_asked, found.size.matched) == (None, False)


def test_dev_cells_never_touch_the_test_split(run_small):
    found, _ = run_small("base", split="dev")
    assert set(found.scores) == {"world_target_dev", "world_retention_dev"}


def test_a_failure_is_in_the_record_with_what_was_done(run_small):
    found, _ = run_small("raising")
    assert (found.status, found.reason) == ("failed", "RuntimeError: no such luck")
    assert "load" in found.phases
    assert found.environment is not None


def test_divergence_is_in_the_record(run_small):
    found, _ = run_small("diverging")
    assert (found.status, found.reason) == ("diverged", "the loss is nan at step 1")
    assert len(found.training.step_seconds) == 1


def odd_task(world_folder, folder, name, scored):
    """Adds to `folder` a task of the world's questions whose items score as `scored` says."""
    text = (world_folder / "tasks" / "world_target.yaml").read_text()
    text = text.replace("task: world_target\n", f"task: {name}\n")
    text = text.replace("../data", str(world_folder / "data"))
    (folder / f"{name}.yaml").write_text(f"{text}process_results: !function {name}.score\n")
    code = f"def score(doc, results):\n    return {{'acc': {scored}}}\n"
    (folder / f"{name}.py").write_text(code)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_score_that_is_not_finite_is_in_the_record(run_small, world_folder, tmp_path, value):
    odd_task(world_folder, tmp_path, "odd", f"float('{value}')")
    odd_task(world_folder, tmp_path, "sane", "1.0")
    tasks = tuple(Task(name, "acc,none", "target") for name in ("odd", "sane"))
    found, _ = run_small("base", suite=small_suite(tasks=tasks, task_folder=str(tmp_path)))
    assert (found.status, found.reason) == ("diverged", f"task odd scored {value} on item 0")
    assert list(found.scores) == ["sane"]
    record.write(found, tmp_path / "r.json")
    assert record.read(tmp_path / "r.json") == found


def test_a_missing_metric_is_an_error(run_small):
    suite = small_suite()
    tasks = tuple(
        task if task.name != "world_target" else type(task)("world_target", "f1,none", "target")
        for task in suite.tasks
    )
    found, _ = run_small("base", suite=small_suite(tasks=tasks))
    assert found.status == "failed"
    assert "world_target has no metric 'f1,none'" in found.reason
    assert found.scores == {}


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DivergedError("the loss is inf at step 4"), "diverged"),
        (MemoryError(), "oom"),
        (torch.OutOfMemoryError("CUDA out of memory"), "oom"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "oom"),
        (KeyError("q_proj"), "failed"),
    ],
)
def test_diagnosis(error, status):
    assert cell_module.diagnose(error)[0] == status


def test_allocating_too_much_is_oom():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert cell_module.diagnose(caught.value)[0] == "oom"


@pytest.mark.parametrize(("met", "matched"), [(100, True), (101, True), (102, False), (98, False)])
def test_matched_is_within_one_percent(met, matched):
    model = torch.nn.Linear(2, 2).to(torch.bfloat16)
    contestant = type("Contestant", (), {"num_trainable": met, "model": model})
    found = cell_module.size(contestant, 1000, 100)
    assert found.matched is matched
    assert found.trainable_dtypes == ("bfloat16",)


def test_gradient_checkpointing_keeps_less_for_backward(run_small):
    kept = [
        run_small("lora", suite=small_suite(recipe=Recipe(2, 4, gradient_checkpointing=on)))[0]
        for on in (False, True)
    ]
    assert [found.status for found in kept] == ["ok", "ok"]
    assert kept[1].size.saved_for_backward_bytes < 0.8 * kept[0].size.saved_for_backward_bytes
    assert len(kept[0].training.yardstick_seconds) == 2


def test_what_was_dropped_is_not_what_was_truncated():
    class Cut(list):
        num_dropped, num_truncated = 3, 5

    history = SimpleNamespace(resumed_at=())
    work = SimpleNamespace(rank=Rank(), checkpoints=SimpleNamespace(history=history))
    watch = LossWatch(lambda step, loss: None)
    found = cell_module._training(work, Cut([1, 2]), StepMeter("cpu"), watch)
    assert (found.num_examples, found.num_dropped, found.num_truncated) == (2, 3, 5)
