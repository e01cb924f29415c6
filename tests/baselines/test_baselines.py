"""The baselines against what their names promise."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from baselines.base import Base
from baselines.full import Full
from baselines.lora import Lora, solve_rank
from suites.suite import Budget

TARGETS = ("q_proj", "down_proj")
BATCH = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]])}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    ).eval()


def step(contestant):
    optimizer = contestant.optimizer(lr=1e-2, weight_decay=0.0)
    contestant.model(**BATCH, labels=BATCH["input_ids"]).loss.backward()
    optimizer.step()


def logits(model):
    with torch.no_grad():
        return model(**BATCH).logits


def test_base_trains_and_keeps_nothing(model, tmp_path):
    contestant = Base().prepare(model, None, 10)
    contestant.artifact(tmp_path / "kept")
    assert contestant.num_trainable == 0
    assert list((tmp_path / "kept").iterdir()) == []


def test_full_trains_every_weight(model):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    contestant = Full().prepare(model.requires_grad_(False), None, 10)
    assert contestant.num_trainable == model.num_parameters()
    step(contestant)
    changed = [name for name, weight in model.named_parameters() if (weight != before[name]).any()]
    assert changed == list(before)


def test_full_artifact_loads_as_a_model(model, tmp_path):
    contestant = Full().prepare(model, None, 10)
    step(contestant)
    contestant.artifact(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(kept), logits(model))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_meets_the_budget_exactly(model, rank):
    budget = Budget(rank, TARGETS)
    asked = budget.num_weights(model)
    assert solve_rank(model, budget) == rank
    contestant = Lora().prepare(model, budget, 10)
    assert contestant.num_trainable == asked == 2 * rank * (16 + 16 + 24 + 16)


def test_lora_is_pefts_and_starts_as_the_base(model):
    before = logits(model)
    contestant = Lora(alpha_over_rank=1.5).prepare(model, Budget(2, TARGETS), 10)
    config = contestant.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 3.0)
    assert torch.equal(logits(contestant.model.eval()), before)


def test_lora_artifact_loads_as_an_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    contestant = Lora().prepare(model, Budget(2, TARGETS), 10)
    step(contestant)
    contestant.artifact(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kept = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.allclose(logits(kept), logits(contestant.model.eval()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha_over_rank": 0.0}, "alpha_over_rank must be positive, got 0.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_hyper_parameters_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        Lora(**options)


def test_lora_without_targets_names_them(model):
    with pytest.raises(ValueError, match="none of the targeted modules: nowhere"):
        Lora().prepare(model, Budget(2, ("nowhere",)), 10)
