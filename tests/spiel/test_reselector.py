"""The Reselector over a small Llama: schedule, gradients of whole steps, resuming, misuse."""

import copy
import warnings

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spiel
from spiel.model import spiel_layers

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SCHEDULE = {"reselection_steps": 6, "selection_accumulation_steps": 3}


def make(growth="ag", optimizer=None, total_steps=20, **config):
    torch.manual_seed(0)
    values = {"growth": growth, "num_tunable_weights": 1000, **SCHEDULE, **config}
    base = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model = peft.get_peft_model(base, spiel.SpielConfig(target_modules="all-linear", **values))
    if optimizer is None:
        optimizer = spiel.SpielAdamW if growth == "ag" else spiel.SpielSM3
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, optimizer, spiel.Reselector(model, optimizer, total_steps)


def batches(num, size=4, seed=1):
    return torch.randint(40, (num, size, 8), generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, reselector, data, accumulation=1):
    for step in data.split(accumulation):
        for input_ids in step:
            loss = model(input_ids=input_ids, labels=input_ids).loss
            (loss / len(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()


def assert_same_deltas(one, other, exact=False):
    other = spiel.get_deltas(other)
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for name, (indices, values) in spiel.get_deltas(one).items():
        assert torch.equal(indices, other[name][0]), name
        torch.testing.assert_close(values, other[name][1], **tolerance)


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_supports_change_at_reselections_only(growth):
    model, optimizer, reselector = make(growth)
    changed = []
    for step, batch in enumerate(batches(20).split(1), start=1):
        before = spiel.get_deltas(model)
        train(model, optimizer, reselector, batch)
        after = spiel.get_deltas(model)
        if any(not torch.equal(before[name][0], after[name][0]) for name in before):
            changed.append(step)
    assert changed == [3, 9, 15]


def test_window_seeds_are_means_over_whole_optimizer_steps():
    """Unlike in the original code: with the same candidates, accumulation changes nothing."""
    runs = {}
    for accumulation in (1, 4):
        model, optimizer, reselector = make(total_steps=8)
        for name, window in reselector.windows.items():
            numel = spiel_layers(model)[1][name].get_base_layer().weight.numel()
            torch.manual_seed(len(name))
            window.candidates = torch.randperm(numel)[: len(window.deltas)].sort().values
        data = batches(8, size=8)
        if accumulation > 1:
            data = data.view(8 * accumulation, 8 // accumulation, 8)
        train(model, optimizer, reselector, data[: 3 * accumulation], accumulation)
        runs[accumulation] = model, optimizer
    assert_same_deltas(runs[1][0], runs[4][0])
    for one, other in zip(*(o.state.values() for _, o in runs.values()), strict=True):
        torch.testing.assert_close(one["exp_avg"], other["exp_avg"], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(one["exp_avg_sq"], other["exp_avg_sq"], rtol=1e-3, atol=1e-9)
        assert one["age"].tolist() == other["age"].tolist()
        assert set(one["age"].tolist()) <= {3, 4}  # grown, or dropped and grown again


def test_window_gradients_are_clipped_as_the_optimizers_are():
    def window_of(reselector):
        return list(reselector.windows.values())[-1]

    model, optimizer, reselector = make()
    train(model, optimizer, reselector, batches(1))
    plain = window_of(reselector).sums

    model, optimizer, reselector = make()
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.001)
    optimizer.step()
    reselector.step()
    torch.testing.assert_close(window_of(reselector).sums, plain * 0.001 / norm)

    model, optimizer, reselector = make()
    (model(input_ids=batches(1)[0], labels=batches(1)[0]).loss * 1024).backward()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= 1024  # as a GradScaler does before the step
    optimizer.step()
    reselector.step()
    torch.testing.assert_close(window_of(reselector).sums, plain)


def test_sums_do_not_saturate_in_bf16():
    """Counts are integers and sums fp32, whatever the deltas' dtype."""
    model, optimizer, reselector = make(delta_dtype="bfloat16", total_steps=20)
    train(model, optimizer, reselector, batches(2))
    for window in reselector.windows.values():
        assert window.num_steps == 2
        assert window.sums.dtype == window.squares.dtype == torch.float32


@pytest.mark.parametrize("growth", ["ag", "ma"])
@pytest.mark.parametrize("stop", [1, 4, 6, 9])  # within and outside of windows
def test_a_loop_resumed_from_state_dicts_goes_on_bit_for_bit(growth, stop, tmp_path):
    data = batches(20)
    model, optimizer, reselector = make(growth)
    train(model, optimizer, reselector, data[:stop])
    states = {"optimizer": optimizer.state_dict(), "reselector": reselector.state_dict()}
    torch.save(states, tmp_path / "states.pt")
    model.save_pretrained(tmp_path)
    train(model, optimizer, reselector, data[stop:])

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**LLAMA))
    resumed = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).train()
    optimizer = {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth](resumed, lr=0.01)
    reselector = spiel.Reselector(resumed, optimizer, 20)
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    optimizer.load_state_dict(states["optimizer"])
    reselector.load_state_dict(states["reselector"])
    train(resumed, optimizer, reselector, data[stop:])
    assert_same_deltas(model, resumed, exact=True)


def test_a_state_may_be_loaded_again():
    """Whatever was trained after the first time."""
    model, optimizer, reselector = make()
    train(model, optimizer, reselector, batches(2))
    state = copy.deepcopy(reselector.state_dict())
    found = []
    for _ in range(2):
        reselector.load_state_dict(state)
        found.append([window.sums.clone() for window in reselector.windows.values()])
        train(model, optimizer, reselector, batches(1))
    assert all(map(torch.equal, *found))


def test_the_same_seed_gives_the_same_bits():
    models = []
    for _ in range(2):
        models.append(make()[0])
        model, optimizer, reselector = make()
        train(model, optimizer, reselector, batches(10))
        models.append(model)
    assert_same_deltas(models[0], models[2], exact=True)
    assert_same_deltas(models[1], models[3], exact=True)


def test_torchs_adamw_may_be_used_and_is_told_of():
    with pytest.warns(UserWarning, match="AdamW keeps no age"):
        model, optimizer, reselector = make(optimizer=torch.optim.AdamW)
    train(model, optimizer, reselector, batches(3))
    unseeded = torch.cat([state["exp_avg"] == 0 for state in optimizer.state.values()])
    assert unseeded.float().mean() > 0.5  # the rest was dropped and grown again, and stayed
    train(model, optimizer, reselector, batches(2))


def test_a_step_out_of_order_is_refused():
    model, optimizer, reselector = make()
    with pytest.raises(RuntimeError, match="0 optimizer steps since the last call"):
        reselector.step()
    train(model, optimizer, reselector, batches(1))
    optimizer.step()
    optimizer.step()
    with pytest.raises(RuntimeError, match="2 optimizer steps since the last call"):
        reselector.step()


def test_a_skipped_step_is_forgotten():
    model, optimizer, reselector = make()
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    reselector.skip_step()
    optimizer.zero_grad()
    train(model, optimizer, reselector, batches(3, seed=2))
    fresh, optimizer, reselector = make()
    train(fresh, optimizer, reselector, batches(3, seed=2))
    assert_same_deltas(model, fresh, exact=True)


def test_an_optimizer_without_the_deltas_is_refused():
    model, _, reselector = make()
    reselector.close()
    other = spiel.SpielAdamW([torch.nn.Parameter(torch.zeros(1))])
    with pytest.raises(ValueError, match=r"does not have the deltas of .*q_proj"):
        spiel.Reselector(model, other, 20)


def test_ma_needs_sm3():
    with pytest.raises(TypeError, match=r"growth 'ma' reads the momenta of spiel\.SpielSM3"):
        make("ma", optimizer=torch.optim.AdamW)


def test_training_too_short_is_refused():
    with pytest.raises(ValueError, match="total_steps 3 is too small"):
        make(total_steps=3)


def test_close_leaves_no_trace_in_the_model():
    model, optimizer, reselector = make()
    reselector.close()
    assert all(not layer.observers for layer in spiel_layers(model)[1].values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_second_training_keeps_what_the_first_learned(tmp_path):
    model, optimizer, reselector = make()
    train(model, optimizer, reselector, batches(20))
    reselector.close()
    states = []
    for loads in (False, True):
        optimizer = spiel.SpielAdamW(model, lr=0.0)
        reselector = spiel.Reselector(model, optimizer, 20)
        if loads:  # the state of an interrupted training decides, not what the deltas are now
            reselector.load_state_dict({**reselector.state_dict(), "is_random": True})
        states.append(reselector.state_dict()["is_random"])
        before = spiel.get_deltas(model)
        train(model, optimizer, reselector, batches(3))
        after = spiel.get_deltas(model)
        reselector.close()
        if not loads:
            for name, (indices, values) in before.items():
                kept = torch.isin(indices, after[name][0])
                assert kept.float().mean() >= 1 - 0.2 * (1 - 3 / 20)
                assert values[kept].square().sum() > 0.9 * values.square().sum()
    assert states == [False, True]
    assert any((values == 0).float().mean() > 0.4 for _, values in after.values())


def test_a_state_dict_that_was_kept_is_still_that_of_an_adapter():
    """Its tensors are those in the model, as with any adapter; none may be of another support."""
    model, optimizer, reselector = make()
    train(model, optimizer, reselector, batches(4))
    before = spiel.get_deltas(model)
    kept = peft.get_peft_model_state_dict(model)
    train(model, optimizer, reselector, batches(5))
    peft.set_peft_model_state_dict(model, kept)
    for name, (indices, values) in spiel.get_deltas(model).items():
        assert torch.equal(indices, before[name][0])
        assert ((values != 0) == (before[name][1] != 0)).all()


def test_base_weights_that_are_trained_too_are_refused():
    model, optimizer, reselector = make()
    reselector.close()
    model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"the base weight of .*q_proj requires a gradient too"):
        spiel.Reselector(model, optimizer, 20)


def test_merged_adapters_are_refused():
    model, optimizer, reselector = make()
    reselector.close()
    model.merge_adapter()
    with pytest.raises(
        RuntimeError, match=r"q_proj has merged adapters \(default\); unmerge first"
    ):
        spiel.Reselector(model, optimizer, 20)


def test_a_frozen_adapter_is_refused(tmp_path):
    model, _, reselector = make()
    reselector.close()
    model.save_pretrained(tmp_path)
    frozen = peft.PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**LLAMA)), tmp_path)
    with pytest.raises(ValueError, match=r"frozen .* load it with is_trainable=True"):
        spiel.Reselector(frozen, spiel.SpielAdamW(frozen.parameters()), 20)
    with pytest.raises(ValueError, match=r"no parameter to train: .* is_trainable=True"):
        spiel.SpielAdamW(frozen)


@pytest.mark.parametrize(("growth", "options"), [("ag", {}), ("ma", {"momentum": 0.5})])
def test_an_adapter_of_another_support_does_not_get_old_momenta(growth, options, tmp_path):
    kind = {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth]
    model, optimizer, reselector = make(growth, lambda params, lr: kind(params, lr=lr, **options))
    train(model, optimizer, reselector, batches(2))
    model.save_pretrained(tmp_path)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, reselector, batches(6))
    model.load_adapter(tmp_path, "default", is_trainable=True)
    with pytest.raises(RuntimeError, match=r"support of .* is another than when"):
        train(model, optimizer, reselector, batches(1))
    reselector.close()
    with pytest.raises(RuntimeError, match="make a new optimizer"):
        spiel.Reselector(model, optimizer, 20)
    optimizer.load_state_dict(saved)
    train(model, optimizer, spiel.Reselector(model, optimizer, 20), batches(6))


class Derived(torch.optim.SGD):
    """Calls its base's step, which torch announces too once there was a plain SGD."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.filterwarnings("ignore:Derived keeps no age")
def test_a_step_that_calls_its_bases_is_one_step():
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    model, optimizer, reselector = make(optimizer=Derived)
    train(model, optimizer, reselector, batches(2))
    assert reselector.t == 2


class Bytes(torch.optim.SGD):
    """Keeps a state that cannot follow a reselection, as 8-bit optimisers do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["bytes"] = torch.zeros_like(parameter, dtype=torch.uint8)


@pytest.mark.filterwarnings("ignore:Bytes keeps no age")
def test_an_optimizer_whose_state_cannot_follow_is_refused_after_its_first_step():
    model, optimizer, reselector = make(optimizer=Bytes)
    with pytest.raises(TypeError, match="Bytes keeps 'bytes' in a form that cannot follow"):
        train(model, optimizer, reselector, batches(1))


@pytest.mark.parametrize("optimizer", [spiel.SpielSM3, torch.optim.LBFGS])
def test_ag_refuses_optimizers_without_state_for_each_weight(optimizer):
    with pytest.raises(TypeError, match="growth 'ag' cannot use"):
        make(optimizer=optimizer)


@pytest.mark.parametrize("total_steps", [None, 6.5, "20"])
def test_total_steps_must_be_an_integer(total_steps):
    with pytest.raises(TypeError, match="total_steps must be an integer"):
        make(total_steps=total_steps)


def test_a_skipped_step_keeps_the_candidates_of_the_steps_before():
    model, optimizer, reselector = make()
    train(model, optimizer, reselector, batches(1))
    before = {name: window.candidates for name, window in reselector.windows.items()}
    assert before and all(chosen is not None for chosen in before.values())
    (batch,) = batches(1, seed=2)
    model(input_ids=batch, labels=batch).loss.backward()
    reselector.skip_step()
    assert all(window.candidates is before[name] for name, window in reselector.windows.items())


def test_closing_leaves_no_hook_at_the_optimizer():
    _, optimizer, reselector = make()
    assert optimizer._optimizer_step_pre_hooks and optimizer._optimizer_step_post_hooks
    reselector.close()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
