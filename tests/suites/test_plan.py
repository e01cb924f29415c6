"""Which cells a suite becomes, what they are called, and when two are the same work."""

import dataclasses
from pathlib import Path

import pytest

from suites.methods import METHODS
from suites.overrides import override
from suites.plan import plan, plan_search, records_folder, safe_name
from suites.suite import ModelSource, Tuning
from suites.values import nearest
from tests.suites.arena import cell, small_suite


def test_seeds_are_outermost():
    cells = plan(small_suite(), ["base", "lora"], [0, 1])
    assert [(c.seed, c.method) for c in cells] == [
        (0, "base"),
        (0, "lora"),
        (1, "lora"),
        (1, "base"),
    ]


def test_record_paths():
    out = Path("results")
    assert cell().record_path(out) == out / "records/small/world/lora-r2-s0.json"
    trial = cell(split="dev").record_path(out)
    assert trial == out / "records/small/world/search/lora-r2-lr0.001-wd0-s0.json"


def test_model_becomes_a_safe_folder():
    suite = small_suite(model=ModelSource("meta-llama/Llama-2-7b"))
    assert records_folder(suite, Path()).name == "meta-llama--Llama-2-7b"
    assert "/" not in safe_name("/a b/../c")


def test_names_of_files_are_neither_too_long_nor_the_same():
    assert safe_name("meta-llama/Llama-2-7b-hf") == "meta-llama--Llama-2-7b-hf"
    assert safe_name("peft:my/config.json") == "peft--my--config.json"
    assert safe_name("ä") != safe_name("ö")
    longer = [safe_name("/".join([*["folder"] * 50, last])) for last in "ab"]
    assert len(set(longer)) == 2
    assert {len(name) for name in longer} == {100}


def test_cell_hash_follows_what_decides_the_result():
    same = cell().hash
    assert cell().hash == same
    others = [
        cell(seed=1),
        cell(split="dev"),
        cell("full"),
        dataclasses.replace(cell(), tuning=Tuning(lr=0.5)),
        dataclasses.replace(
            cell(), entry=dataclasses.replace(METHODS["lora"], options={"alpha_over_rank": 1.0})
        ),
        cell(suite=override(small_suite(), limit=3)),
    ]
    assert len({same, *(other.hash for other in others)}) == len(others) + 1


def test_cell_hash_ignores_other_methods_and_seeds():
    suite = small_suite()
    tunings = {**suite.tunings, "more": Tuning(1.0)}
    assert cell(suite=dataclasses.replace(suite, tunings=tunings, seeds=(7,))).hash == cell().hash


def test_methods_take_turns_in_being_the_first():
    cells = plan(small_suite(), ["lora", "full", "base"], [5, 6, 7, 8])
    orders = {seed: "".join(c.method[0] for c in cells if c.seed == seed) for seed in (5, 6, 7, 8)}
    assert orders == {5: "lfb", 6: "fbl", 7: "blf", 8: "lfb"}
    trials = plan_search(small_suite(), ["lora", "full"], [0, 1])
    assert "".join(trial.method[0] for trial in trials) == "llffffll"


def test_override_keeps_files_and_hashes_apart():
    suite = small_suite()
    changed = override(suite, steps=7, limit=5)
    assert changed.name == "small-steps7-limit5"
    assert (changed.recipe.num_steps, changed.limit) == (7, 5)
    assert changed.hash != suite.hash
    assert override(suite) == suite


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lara", "unknown method 'lara'; choose from lora, "),
        ("spiel", "small has no learning rate for 'spiel', only for lora"),
    ],
)
def test_plan_names_what_it_cannot_do(method, message):
    with pytest.raises(ValueError, match=message):
        plan(small_suite(tunings={"lora": Tuning(1e-3)}), [method], [0])


def test_search_gives_methods_equal_trials_on_dev():
    cells = plan_search(small_suite(), ["base", "full", "lora"], [0, 1])
    assert len(cells) == 2 * 2 * 2
    assert {c.split for c in cells} == {"dev"}
    assert {c.method for c in cells} == {"full", "lora"}
    assert len({c.name for c in cells}) == len(cells)


@pytest.mark.parametrize(
    ("grids", "methods", "message"),
    [
        ({"lora": (Tuning(1.0),), "full": (Tuning(1.0), Tuning(2.0))}, ["lora", "full"], "differ"),
        ({"lora": (Tuning(1.0),)}, ["full"], "no grid for 'full', only for lora"),
        ({}, ["base"], "base does not train"),
    ],
)
def test_unfair_searches_are_refused(grids, methods, message):
    with pytest.raises(ValueError, match=message):
        plan_search(small_suite(grids=grids), methods, [0])


def test_nearest_first():
    assert nearest("spile", ["base", "spiel", "lora"])[0] == "spiel"


def test_a_description_decides_nothing():
    entry = dataclasses.replace(cell().entry, description="in other words")
    assert dataclasses.replace(cell(), entry=entry).hash == cell().hash


def test_cells_of_other_settings_share_no_checkpoint_artifact_or_log():
    out, one = Path("results"), cell()
    other = dataclasses.replace(one, entry=dataclasses.replace(one.entry, options={"dropout": 0.1}))
    assert one.name == other.name
    assert one.checkpoints(out) != other.checkpoints(out)
    assert one.artifact_path(out) != other.artifact_path(out)


def test_a_trial_and_the_cell_that_it_picks_share_no_log_or_lock():
    out = Path("results")
    trial, picked = (
        dataclasses.replace(cell(split=split), tuning=Tuning(0.5)) for split in ("dev", "test")
    )
    assert trial.name == picked.name
    assert trial.log_path(out) != picked.log_path(out)
    assert trial.lock_path(out) != picked.lock_path(out)
