"""A budget is one number, given in one of three forms, and says so where it is not."""

import dataclasses
import json
import re

import pytest
import torch

from suites.suite import Budget
from tests.baselines.llama import make_llama

TARGETS = ("q_proj",)


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("r64", {"lora_rank": 64}),
        ("500000", {"num_trainable": 500000}),
        ("0.01", {"density": 0.01}),
        (".5", {"density": 0.5}),
        ("2e-05", {"density": 2e-05}),
    ],
)
def test_parse(text, given):
    found = Budget.parse(text, list(TARGETS))
    assert found == Budget(target_modules=TARGETS, **given)
    assert Budget.parse(found.label, TARGETS) == found
    json.dumps(dataclasses.asdict(found))
    hash(found)


@pytest.mark.parametrize(
    "text", ["", "r", "r0", "0", "0.0", "1.0", "1.5", "-3", "r-2", "64r", "R8", "nan", "1e5", "٣"]
)
def test_what_is_no_budget_is_named_with_what_is(text):
    with pytest.raises(ValueError, match=f"budget '{re.escape(text)}'.*r64 .* 500000 .* 0.01 "):
        Budget.parse(text, TARGETS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "one of lora_rank, num_trainable, density; got none"),
        ({"lora_rank": 1, "density": 0.1}, "got {'lora_rank': 1, 'density': 0.1}"),
        ({"lora_rank": 0}, "lora_rank must be positive, got 0"),
        ({"num_trainable": -1}, "num_trainable must be positive, got -1"),
        ({"density": 1.0}, "density must be below 1, got 1.0"),
        ({"lora_rank": 1, "target_modules": ()}, "target_modules is empty"),
        (
            {"lora_rank": 1, "target_modules": ("q_proj")},  # the comma was forgotten
            r"the string 'q_proj'; allowed: a tuple or list of names, as \('q_proj',\)",
        ),
    ],
)
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        Budget(**{"target_modules": TARGETS, **values})


def test_num_weights():
    model = make_llama()
    sides = 2 * (32 + 32)
    assert Budget(3, TARGETS).num_weights(model) == 3 * sides
    assert Budget(None, TARGETS, num_trainable=7).num_weights(model) == 7
    allowed = Budget(None, TARGETS, density=0.01).num_weights(model)
    assert allowed == round(0.01 * model.num_parameters())
    with pytest.raises(ValueError, match=r"density 1e-09 of .* is less than one weight"):
        Budget(None, TARGETS, density=1e-9).num_weights(model)


@pytest.mark.parametrize("given", [{"lora_rank": 3}, {"num_trainable": 7}, {"density": 0.1}])
def test_without_targets_there_is_no_budget(given):
    with pytest.raises(
        ValueError, match=r"no module k of the targeted ones; it has q_proj, k_proj.*suite file"
    ):
        Budget(target_modules=("q_proj", "k"), **given).num_weights(make_llama())


def test_4_bit_weights_count_as_many_as_they_hold():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4").to("cpu")
    model = torch.nn.ModuleDict({"q_proj": layer})
    assert Budget(4, TARGETS).num_weights(model) == 4 * (64 + 48)


def test_gpt2s_linears_count_too():
    from transformers.pytorch_utils import Conv1D

    model = torch.nn.ModuleDict({"q_proj": Conv1D(48, 64)})
    assert Budget(4, TARGETS).num_weights(model) == 4 * (64 + 48)


def test_a_density_is_of_all_weights_frozen_or_not():
    model, budget = make_llama(), Budget(density=0.01, target_modules=("q_proj",))
    asked = budget.num_weights(model)
    assert asked == round(0.01 * model.num_parameters())
    assert budget.num_weights(model.requires_grad_(False)) == asked
