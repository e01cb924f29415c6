"""The baselines against what their names promise."""

import math
from bisect import bisect_right

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from baselines import sizing
from baselines.adapter import Adapter, make_config
from baselines.base import Base
from baselines.full import Full
from baselines.lora import Lora, solve_ranks
from baselines.prefix import Prefix, initialize
from baselines.supertuning import Supertuning, solve_sparsity
from suites.catalog import LLAMA_PROJECTIONS
from suites.methods import METHODS
from suites.suite import Budget
from tests.baselines.llama import BATCH, budget, logits, make_llama, train

TARGETS = ("q_proj", "down_proj")


@pytest.fixture
def model():
    return make_llama()


def test_base_trains_and_keeps_nothing(model, tmp_path):
    contestant = Base().prepare(model, None, 10)
    contestant.artifact(tmp_path / "kept")
    assert contestant.num_trainable == 0
    assert list((tmp_path / "kept").iterdir()) == []


def test_full_trains_every_weight(model):
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    contestant = Full().prepare(model.requires_grad_(False), None, 10)
    assert contestant.num_trainable == model.num_parameters()
    train(contestant, steps=1)
    changed = [name for name, weight in model.named_parameters() if (weight != before[name]).any()]
    assert changed == list(before)


def test_full_artifact_loads_as_a_model(model, tmp_path):
    contestant = Full().prepare(model, None, 10)
    train(contestant, steps=1)
    contestant.artifact(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(kept), logits(model))


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lora_of_a_rank_has_that_rank(model, rank):
    asked = Budget(rank, TARGETS)
    contestant = Lora().prepare(model, asked, 10)
    assert contestant.num_trainable == 2 * rank * (32 + 32 + 48 + 32)
    assert contestant.model.peft_config["default"].r == rank
    assert contestant.model.peft_config["default"].rank_pattern == {}


def test_lora_is_pefts_and_starts_as_the_base(model):
    before = logits(model)
    contestant = Lora(alpha_over_rank=1.5).prepare(model, Budget(2, TARGETS), 10)
    config = contestant.model.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 3.0)
    own = Lora(variant={"lora_alpha": 16}).prepare(make_llama(), Budget(2, TARGETS), 10)
    config = own.model.active_peft_config
    assert (config.r, config.lora_alpha, config.alpha_pattern) == (2, 16, {})
    assert torch.equal(logits(contestant.model.eval()), before)


def test_lora_between_two_ranks_scales_all_modules_alike(model):
    asked = Budget(target_modules=TARGETS, num_trainable=2 * 144 * 5 + 160)
    contestant = Lora().prepare(model, asked, 10)
    layers = [module for module in contestant.model.modules() if hasattr(module, "lora_A")]
    assert {layer.r["default"] for layer in layers} == {5, 6}
    assert {layer.scaling["default"] for layer in layers} == {2.0}


def test_ranks_differ_by_one_at_most_and_only_if_they_must():
    sides = {"a": 30, "b": 20, "c": 10}
    assert solve_ranks(sides, 120) == {"a": 2, "b": 2, "c": 2}
    assert solve_ranks(sides, 121) == {"a": 2, "b": 2, "c": 2}
    assert solve_ranks(sides, 150) == {"a": 3, "b": 2, "c": 2}
    assert solve_ranks(sides, 130) == {"a": 2, "b": 2, "c": 3}
    assert solve_ranks(sides, 7) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("asked", [3, 57, 400, 999])
def test_sparsity_keeps_what_is_asked(asked):
    numels = [100, 300, 600]
    sparsity = solve_sparsity(numels, asked)
    kept = sum(int(numel * (1 - sparsity)) for numel in numels)
    assert asked <= kept <= asked + len(numels)


def test_knobs_that_grow_fall_and_end_are_solved():
    assert sizing.solve(lambda knob: 10 * knob, 52, 100, "") == 5
    assert sizing.solve(lambda knob: 10 * knob, 2, 100, "") == 1
    assert sizing.solve(lambda knob: 1000 // knob, 100, 500, "") == 10

    def refusing(knob):
        if knob > 7:
            raise ValueError("too large")
        return 10 * knob

    assert sizing.solve(refusing, 70, 100, "") == 7
    with pytest.raises(ValueError, match="no way; the most it can have is 70"):
        sizing.solve(refusing, 80, 100, "no way")


def test_what_is_wrong_with_every_knob_is_raised():
    def broken(knob):
        raise ValueError("no such module")

    with pytest.raises(ValueError, match="no such module"):
        sizing.solve(broken, 80, 100, "")


def test_counting_leaves_the_model_as_it_is(model):
    before = dict(model.named_modules())
    config = make_config("MISS", {"r": 3}, TARGETS)
    assert sizing.count_trainable(model, config) == 2 * 3 * (32 + 32)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("peft_type", "options"),
    [
        ("RANDLORA", {}),
        ("MISS", {}),
        ("SHIRA", {}),
        ("MISS", {"modules_to_save": ["lm_head"]}),  # outside of the layers
        ("MISS", {"layers_to_transform": [1]}),  # not in all layers
    ],
)
def test_a_counter_counts_as_on_the_whole_model(peft_type, options):
    model = make_llama(num_hidden_layers=4)
    counter = sizing.Counter(model)
    for rank in (2, 3, 5, 16):
        config = make_config(peft_type, {"r": rank, **options}, TARGETS)
        assert counter(config) == sizing.count_trainable(model, config)
    assert counter.are_alike is not bool(options)


@given(
    counts=st.lists(st.integers(0, 10**6) | st.just(math.inf), min_size=1, max_size=400),
    asked=st.integers(0, 10**6),
)
def test_the_first_above_is_what_bisecting_finds(counts, asked):
    counts.sort()
    found = sizing.first_above(counts.__getitem__, range(len(counts)), asked)
    assert found == bisect_right(counts, asked)


@pytest.mark.parametrize("asked", [3, 40_960, 77_312, 10**6])
def test_along_a_line_few_are_counted(asked):
    counted = []

    def tally(knob):
        counted.append(knob)
        return 1000 * knob

    assert sizing.first_above(tally, range(1, 4097), asked) == asked // 1000
    assert len(set(counted)) <= 6


def test_a_size_is_solved_with_two_models_of_full_depth(monkeypatch):
    depths, build = [], LlamaForCausalLM.__init__

    def watched(model, config):
        depths.append(config.num_hidden_layers)
        build(model, config)

    model = make_llama(num_hidden_layers=5)
    monkeypatch.setattr(LlamaForCausalLM, "__init__", watched)
    assert METHODS["randlora"].load().size(model, budget()) > 0
    assert depths.count(5) == 2  # to see that all layers are alike, and of the size it picked
    assert len(depths) > 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Lora(alpha_over_rank=0.0), "alpha_over_rank must be positive, got 0.0"),
        (lambda: Lora(dropout=1.0), r"dropout must be in \[0, 1\), got 1.0"),
        (lambda: Supertuning("s", 1.0, True, 1.0), r"low_rank_share must be in \[0, 1\), got 1.0"),
        (lambda: make_config("NONE", {}, ()), "peft_type 'NONE' is unknown.*ADALORA, .*LORA"),
        (lambda: make_config("LORA", {"rang": 1}, ()), "LORA has no option 'rang'; it has .*r, "),
    ],
)
def test_bad_hyper_parameters_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_lora_without_targets_names_them(model):
    with pytest.raises(ValueError, match="no module nowhere of the targeted ones"):
        Lora().prepare(model, Budget(2, ("nowhere",)), 10)


def test_a_prefix_begins_as_what_tokens_before_would_do(model):
    contestant = Prefix(activations=True).prepare(model, budget("r1"), 10)
    tokens = initialize(contestant.model).expand(len(BATCH["input_ids"]), -1)
    prefixed = logits(contestant.model)
    with torch.no_grad():
        whole = model(input_ids=torch.cat([tokens, BATCH["input_ids"]], dim=1)).logits
    torch.testing.assert_close(prefixed, whole[:, tokens.shape[1] :])


def test_a_prefix_ends_with_a_table_of_places():
    config = GPT2Config(vocab_size=9, n_positions=16, n_embd=8, n_layer=1, n_head=1)
    prefix = Adapter("prefix", "PREFIX_TUNING", knob="num_virtual_tokens")
    asked = Budget(target_modules=("c_proj",), num_trainable=400)
    with pytest.raises(ValueError, match=r"prefix cannot have 400 .*; the most it can have is 256"):
        prefix.prepare(GPT2LMHeadModel(config), asked, 10)


def test_too_few_for_sparse_and_low_rank_is_refused(model):
    with pytest.raises(ValueError, match=r"supra cannot have as few as 100 weights \(budget 100\)"):
        Supertuning("supra", 0.5, True, 2.0).prepare(model, budget("100"), 10)


def test_lora_has_the_dropout_that_it_is_told(model):
    found = Lora(dropout=0.25).prepare(model, Budget(2, LLAMA_PROJECTIONS), 1).model
    rates = {module.p for module in found.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}


@pytest.mark.parametrize("select_top", [True, False])
def test_supra_has_the_alpha_and_the_support_that_it_is_told(model, select_top):
    asked = Budget(4, LLAMA_PROJECTIONS)
    found = Supertuning("supra", 0.5, select_top, alpha_over_rank=3.0).prepare(model, asked, 1)
    config = found.model.peft_config["default"]
    assert (config.lora_alpha, config.select_top) == (3.0 * config.r, select_top)
    assert config.r > 1


def test_targets_of_the_config_come_before_the_budgets():
    found = make_config("LORA", {"target_modules": ["v_proj"]}, ("q_proj",))
    assert list(found.target_modules) == ["v_proj"]


def test_weight_decay_reaches_the_optimizer(model):
    optimizer = Full().prepare(model, None, 1).optimizer(1e-3, 0.5)
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (1e-3, 0.5)


def test_counting_leaves_the_config_as_it_is(model):
    config = make_config("RANDLORA", {"r": 2}, ("q_proj",))
    before = config.to_dict()
    sizing.count_trainable(model, config)
    assert config.to_dict() == before
