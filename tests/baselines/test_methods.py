"""What METHODS promises of every method, on a small Llama."""

import contextlib
import dataclasses

import pytest
import torch
from peft import AdaLoraModel, PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from suites import cell as cell_module
from suites.distributed import Rank
from suites.methods import METHODS, entry_of
from suites.plan import Cell, Execution
from suites.suite import Recipe, Tuning
from tests.baselines.llama import BATCH, budget, logits, make_llama, train
from tests.suites.arena import small_suite

TRAINED = [name for name, entry in METHODS.items() if entry.trains and name != "frozen"]
ADAPTERS = [name for name in TRAINED if name not in ("full", "full-bf16")]
MATCHED = [name for name, entry in METHODS.items() if entry.matched]

#: Prefixes have no end where places are rotations.
BOUNDED = [name for name in MATCHED if name != "prefix"]

#: Whose size goes in steps, and the largest share of a budget that they miss here.
COARSE = {"miss": 0.06, "randlora": 0.25, "shira": 0.1}

#: What peft's tuner can train on 4-bit weights.
ON_4_BITS = [name for name in ADAPTERS if name not in ("pissa", "supertuning", "supra")]


def prepared(name, model=None, size="r4"):
    torch.manual_seed(1)
    return METHODS[name].load().prepare(model or make_llama(), budget(size), 10)


def frozen(contestant):
    """What is not trained, without the adapter."""
    names = {name for name, w in contestant.model.named_parameters() if not w.requires_grad}
    disabled = getattr(contestant.model, "disable_adapter", contextlib.nullcontext)
    with disabled():
        weights = dict(contestant.model.named_parameters())
        return {name: weights[name].detach().clone() for name in names}


@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_and_changes_nothing_else(name):
    contestant = prepared(name)
    fixed, before = frozen(contestant), logits(contestant.model)
    losses = train(contestant)
    assert losses[-1] < losses[0]
    assert not torch.equal(logits(contestant.model), before)
    after = frozen(contestant)
    assert set(after) == set(fixed)
    assert all(torch.equal(after[key], weight) for key, weight in fixed.items())


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_in_bf16(name):
    contestant = prepared(name, make_llama().to(torch.bfloat16))
    dtype = torch.bfloat16 if name.endswith("-bf16") else torch.float32
    assert {weight.dtype for weight in contestant.model.parameters() if weight.requires_grad} == {
        dtype
    }
    losses = train(contestant)
    assert losses[-1] < losses[0]
    said = contestant.model.generate(
        input_ids=BATCH["input_ids"], max_new_tokens=2, min_new_tokens=2
    )
    assert said.shape == (4, 8)


@pytest.mark.parametrize("size", ["r2", "r8", "8000", "0.3"])
@pytest.mark.parametrize("name", MATCHED)
def test_it_meets_a_budget(name, size):
    contestant = prepared(name, size=size)
    asked = budget(size).num_weights(make_llama())
    assert contestant.num_trainable == pytest.approx(asked, rel=COARSE.get(name, 0.01))


@pytest.mark.parametrize("name", METHODS)
def test_its_size_is_known_before_there_are_values(name):
    with torch.device("meta"):
        hollow = make_llama()
    planned = METHODS[name].load().size(hollow, budget())
    assert planned == prepared(name).num_trainable


@pytest.mark.parametrize("name", BOUNDED)
def test_a_budget_beyond_its_reach_is_refused(name):
    with pytest.raises(ValueError, match=r"1000000.*the most it can have is \d+") as caught:
        prepared(name, size="1000000")
    assert name in str(caught.value)


@pytest.mark.parametrize("name", ADAPTERS)
def test_its_artifact_loads_as_an_adapter(name, tmp_path):
    model = make_llama()
    model.save_pretrained(tmp_path / "base")
    contestant = prepared(name, model)
    train(contestant, steps=2)
    contestant.artifact(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    kept = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(kept), logits(contestant.model), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)

    def load():
        options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=options, dtype=torch.float32
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # it would repack what is trained on
                module.support_avx512bf16_for_cpu = False
        return model

    return load


@pytest.mark.parametrize("name", ADAPTERS)
def test_on_4_bits_it_trains_at_the_same_size_or_says_that_it_cannot(name, four_bits):
    if name not in ON_4_BITS:
        with pytest.raises(ValueError, match=f"^{name} does not train on a quantised model: "):
            prepared(name, four_bits())
        return
    contestant = prepared(name, four_bits())
    dense = prepared(name, make_llama(hidden_size=64, intermediate_size=128))
    assert contestant.num_trainable == dense.num_trainable
    losses = train(contestant, steps=3)
    assert losses[-1] < losses[0]


def test_full_refuses_4_bits(four_bits):
    with pytest.raises(ValueError, match="full cannot train a quantised model"):
        prepared("full", four_bits())


def test_ia3_scales_keys_values_and_what_enters_the_mlps_output():
    model = prepared("ia3").model
    names = {n.split(".")[-3] for n, w in model.named_parameters() if w.requires_grad}
    assert names == {"k_proj", "v_proj", "down_proj"}
    assert set(model.active_peft_config.feedforward_modules) == {"down_proj"}


def test_full_learns_by_steps_that_16_bits_cannot_hold():
    """A rate of 1e-5 is far below half of bfloat16's spacing at most weights."""
    moved = {}
    for name in ("full", "full-bf16"):
        model = make_llama().to(torch.bfloat16)
        contestant = prepared(name, model)
        before = [weight.detach().clone() for weight in contestant.trainable]
        train(contestant, lr=1e-5)
        after = zip(before, contestant.trainable, strict=True)
        moved[name] = sum((old != new).sum().item() for old, new in after)
        assert logits(model).dtype == torch.bfloat16
    assert moved["full"] > 0.9 * contestant.num_trainable > 2 * moved["full-bf16"]


@pytest.mark.parametrize("name", ["full", "ln_tuning"])
def test_it_goes_through_a_cell_in_mixed_precision(name, run_cell):
    found = run_cell(name, METHODS[name], dtype="bfloat16")
    assert (found.status, found.reason) == ("ok", "")
    assert found.size.trainable_dtypes == ("float32",)
    assert found.size.optimizer_state_bytes > 8 * found.size.num_trainable


@pytest.fixture
def run_cell(world_folder, tmp_path):
    def run(name, entry, dtype="float32"):
        recipe = Recipe(num_steps=6, batch_size=4)
        suite = small_suite(tunings={name: Tuning(lr=1e-3)}, recipe=recipe)
        suite = dataclasses.replace(suite, model=dataclasses.replace(suite.model, dtype=dtype))
        way = Execution(save_seconds=None)
        of = Cell(suite, name, entry, suite.tunings[name], 0)
        return cell_module.run(of, world_folder, tmp_path, way, Rank(), lambda report: None)

    return run


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "lora"])
def test_it_goes_through_a_cell(name, run_cell):
    """The Trainer, the weighing of what autograd saves, lm-eval: some tuners may not survive it."""
    found = run_cell(name, METHODS[name])
    assert (found.status, found.reason) == ("ok", "")
    assert len(found.training.losses) == 6
    assert found.size.artifact_bytes > found.size.num_trainable


def test_a_method_that_moves_its_budget_goes_through_a_cell(run_cell, tmp_path, monkeypatch):
    moved, move = [], AdaLoraModel.update_and_allocate

    def watched(tuner, step):
        moved.append(step)
        move(tuner, step)

    monkeypatch.setattr(AdaLoraModel, "update_and_allocate", watched)
    path = tmp_path / "adapter_config.json"
    path.write_text('{"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2}')
    found = run_cell("adalora", entry_of(f"peft:{path}"))
    assert (found.status, found.reason) == ("ok", "")
    assert moved == [0, 1, 2, 3, 4, 5]


def test_the_floor_has_every_pass_and_learns_nothing(run_cell):
    contestant = prepared("frozen")
    before = logits(contestant.model)
    losses = train(contestant, steps=2)
    assert losses[0] == losses[1]
    assert torch.equal(logits(contestant.model), before)
    found = run_cell("frozen", METHODS["frozen"])
    assert (found.status, found.size.num_trainable) == ("ok", 0)
    with_lora = run_cell("lora", METHODS["lora"])
    assert found.training.first_step_flops < with_lora.training.first_step_flops
    assert 3 * found.training.first_step_flops > 2 * with_lora.training.first_step_flops


def test_lora_in_the_models_dtype():
    in_fp32 = prepared("lora", make_llama().bfloat16()).trainable
    own = prepared("lora-bf16", make_llama().bfloat16()).trainable
    assert {weight.dtype for weight in in_fp32} == {torch.float32}
    assert {weight.dtype for weight in own} == {torch.bfloat16}


def test_seeds_choose_other_places_for_random_sparse_deltas():
    name = "base_model.model.model.layers.0.mlp.up_proj"

    def places(seed):
        model = make_llama()
        torch.manual_seed(seed)
        contestant = METHODS["shira"].load().prepare(model, budget(), 10)
        return contestant.model.get_submodule(name).shira_indices["default"]

    assert torch.equal(places(1), places(1))
    assert not torch.equal(places(1), places(2))
