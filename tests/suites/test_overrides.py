"""Flags make another suite, whose name says so and whose records mix with no other's."""

import json
from pathlib import Path

import pytest

from suites.overrides import OVERRIDES, override, parse_tasks
from suites.plan import plan, plan_search
from suites.sources import Task
from tests.suites.arena import small_suite

VALUES = {
    "model": "owner/name",
    "data": "owner/data",
    "tasks": "world_target",
    "task_folder": str(Path(__file__).parent),  # any folder
    "steps": 7,
    "limit": 5,
    "batch_size": 5,
    "eval_batch_size": 5,
    "seq_len": 8,
    "dtype": "bfloat16",
    "quantize": "4bit",
    "budget": "0.01",
    "gradient_checkpointing": True,
    "allow_code_execution": True,
    "trust_remote_code": True,
    "device": "cpu",
}


def test_every_flag_has_a_value_here():
    assert set(VALUES) == set(OVERRIDES)


@pytest.mark.parametrize(("flag", "value"), VALUES.items())
def test_every_override_is_another_suite(flag, value):
    suite = small_suite()
    changed = override(suite, **{flag: value})
    assert changed.hash != suite.hash
    assert changed.name.startswith("small-")
    ours, theirs = plan(suite, ["lora"], [0])[0], plan(changed, ["lora"], [0])[0]
    assert ours.hash != theirs.hash
    assert ours.name == theirs.name or flag == "budget"


def test_nothing_overridden_is_the_suite_itself():
    suite = small_suite()
    nothing = {**dict.fromkeys(OVERRIDES), "gradient_checkpointing": False}
    assert override(suite, **nothing) == suite


def test_values_arrive():
    changed = override(small_suite(), **VALUES)
    assert (changed.model.path, changed.model.dtype, changed.model.quantize) == (
        "owner/name",
        "bfloat16",
        "4bit",
    )
    assert (changed.data.path, changed.data.max_length) == ("owner/data", 8)
    recipe = changed.recipe
    assert (recipe.num_steps, recipe.batch_size, recipe.gradient_checkpointing) == (7, 5, True)
    assert (changed.limit, changed.device, changed.budget.density) == (5, "cpu", 0.01)
    assert changed.budget.target_modules == small_suite().budget.target_modules


def test_a_revision_comes_after_an_at_sign(tmp_path):
    suite = override(small_suite(), model="me/tiny@abc", data="me/rows")
    assert (suite.model.path, suite.model.revision) == ("me/tiny", "abc")
    assert (suite.data.path, suite.data.revision) == ("me/rows", None)
    assert suite.name.startswith("small-model-me--tiny--abc-")
    assert suite.name != override(small_suite(), model="me/tiny", data="me/rows").name
    for bad in ("@abc", "me/tiny@", f"{tmp_path}@abc"):
        with pytest.raises(ValueError, match=r"--model: .* is neither a path nor a hub id"):
            override(small_suite(), model=bad)
    (tmp_path / "a@b").mkdir()
    local = override(suite, model=str(tmp_path / "a@b")).model
    assert (local.path, local.revision) == (str(tmp_path / "a@b"), None)


def test_folders_of_one_name_are_told_apart(tmp_path):
    for parent in "ab":
        (tmp_path / parent / "mine").mkdir(parents=True)
    a, b = (override(small_suite(), model=str(tmp_path / parent / "mine")) for parent in "ab")
    assert a.name != b.name
    assert a.name.startswith("small-model-mine-")


def test_tasks_of_the_suite_and_of_lm_eval():
    suite = small_suite()
    found = parse_tasks("world_target,arc_easy:acc,gsm8k:exact_match/strict:retention", suite)
    assert found[:3] == (
        Task("world_target", "acc,none", "target"),
        Task("arc_easy", "acc,none", "target"),
        Task("gsm8k", "exact_match,strict", "retention"),
    )
    assert found[3:] == suite.tasks_of("dev")  # the search goes on as it was


def test_a_changed_data_file_is_another_cell(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    suite = override(small_suite(), data=str(path))
    before = plan(suite, ["lora"], [0])[0].hash
    assert plan(suite, ["lora"], [0])[0].hash == before
    path.write_text(json.dumps({"prompt": "a", "completion": "c"}))
    assert plan(suite, ["lora"], [0])[0].hash != before


def test_a_method_of_peft_takes_loras_learning_rates(tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    suite, name = small_suite(), f"peft:{path}"
    (found,) = plan(suite, [name], [0])
    assert found.tuning == suite.tunings["lora"]
    assert [trial.tuning for trial in plan_search(suite, [name], [0])] == list(suite.grids["lora"])


def test_a_search_needs_dev_tasks():
    suite = small_suite(tasks=(Task("t", "acc,none", "target"),))
    with pytest.raises(ValueError, match="small has no target task on the dev split"):
        plan_search(suite, ["lora"], [0])
