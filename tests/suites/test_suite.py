"""Suites are checked when made, and their hash says what may be compared."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from suites.methods import METHODS
from suites.suite import (
    SCHEDULES,
    Budget,
    DataSource,
    ModelSource,
    Recipe,
    Task,
    Tuning,
    placed,
)
from tests.suites.arena import small_suite

RETENTION = Task("t", "acc,none", "retention")


def test_hash_follows_what_must_be_shared():
    suite = small_suite()
    recipe = dataclasses.replace(suite.recipe, batch_size=5)
    assert dataclasses.replace(suite, recipe=recipe).hash != suite.hash
    world = dataclasses.replace(suite.world, seed=9)
    assert dataclasses.replace(suite, world=world).hash != suite.hash


def test_hash_ignores_what_is_the_cells_own():
    suite = small_suite()
    other = dataclasses.replace(suite, seeds=(5,), tunings={}, grids={}, description="else")
    assert other.hash == suite.hash


def test_placed_puts_world_paths_into_the_folder_and_no_others():
    suite = dataclasses.replace(small_suite(), data=DataSource("mine.jsonl"))
    found = placed(suite, Path("/w"))
    assert (found.model.path, found.data.path) == ("/w/model", "mine.jsonl")
    assert found.task_folder == "/w/tasks"


def test_budget_is_rank_times_the_sides_of_its_targets():
    model = torch.nn.ModuleDict(
        {"q_proj": torch.nn.Linear(3, 5), "lm_head": torch.nn.Linear(3, 100)}
    )
    assert Budget(4, ("q_proj",)).num_weights(model) == 4 * (3 + 5)
    with pytest.raises(ValueError, match="no module k_proj of the targeted ones"):
        Budget(4, ("k_proj",)).num_weights(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSource("m", dtype="int3"), "'int3' is not one of float32, bfloat16"),
        (lambda: DataSource("d", max_length=0), "max_length must be positive, got 0"),
        (lambda: Task("t", "acc,none", "goal"), "'goal' is not one of target, retention"),
        (lambda: Task("t", "acc,none", "target", split="train"), "'train' is not one of dev, test"),
        (lambda: Recipe(num_steps=0, batch_size=1), "num_steps must be positive, got 0"),
        (
            lambda: Recipe(1, 1, lr_scheduler_type="cosin"),
            "lr_scheduler_type 'cosin' is not one of linear, cosine, ",
        ),
        (lambda: Recipe(1, 1, warmup_ratio=1.0), r"warmup_ratio 1.0 is not in \[0, 1\)"),
        (lambda: Budget(0, ("q_proj",)), "lora_rank must be positive, got 0"),
        (lambda: Budget(1, ()), "target_modules is empty"),
        (lambda: Recipe(1, 1, max_grad_norm=math.inf), "max_grad_norm must be finite, got inf"),
        (lambda: Tuning(lr=0.0), "lr must be positive, got 0.0"),
        (lambda: Tuning(lr=math.inf), "lr must be finite, got inf"),
        (lambda: Tuning(1e-3, math.nan), "weight_decay must be finite, got nan"),
        (lambda: small_suite(tasks=(RETENTION,)), "no target task"),
        (lambda: small_suite(seeds=()), "no seeds"),
        (lambda: small_suite(seeds=(0, 0, 0)), r"seeds are \(0, 0, 0\); allowed: .* each once"),
        (lambda: small_suite(seeds=(0, 0.5)), r"seeds are \(0, 0.5\); allowed: whole numbers"),
        (lambda: small_suite(seeds=(-1,)), r"seeds are \(-1,\); allowed: whole numbers from 0"),
        (
            lambda: small_suite(tunings={"lora": 1e-3}),
            r"tunings\['lora'\] is 0.001; allowed: a Tuning, as Tuning\(lr=",
        ),
        (
            lambda: small_suite(grids={"lora": (Tuning(1e-3), 1e-4)}),
            r"grids\['lora'\]\[1\] is 0.0001; allowed: a Tuning",
        ),
        (lambda: small_suite(limit=0), "limit must be positive, got 0"),
        (lambda: small_suite(device="cuda"), "device 'cuda' is not one of cpu, cuda:N"),
        (lambda: small_suite(eval_batch_size=0), "eval_batch_size must be positive, got 0"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedules_are_those_of_transformers_that_a_recipe_suffices_for():
    from transformers import SchedulerType, get_scheduler
    from transformers.optimization import LambdaLR

    def suffices(kind):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        try:
            made = get_scheduler(kind, optimizer, num_warmup_steps=1, num_training_steps=3)
        except (TypeError, ValueError):
            return False
        return isinstance(made, LambdaLR)  # others follow the metrics of evaluations on the way

    assert tuple(kind.value for kind in SchedulerType if suffices(kind)) == SCHEDULES


@pytest.mark.parametrize("name", METHODS)
def test_every_entry_names_every_field_of_its_method(name):
    entry = METHODS[name]
    method = entry.load()
    assert {field.name for field in dataclasses.fields(method)} == set(entry.options)
