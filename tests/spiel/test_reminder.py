"""Who trains and forgets the Reselector is told; who does not is left alone."""

import peft
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import spiel
from spiel.reminder import _Reminder


@pytest.fixture
def fresh(monkeypatch):
    reminder = _Reminder()
    for module in ("spiel.model", "spiel.reselector"):
        monkeypatch.setattr(f"{module}.reminder", reminder)
    yield reminder
    reminder.forget()


def told_after(num_steps, recwarn, has_reselector=False, optimizer=spiel.SpielAdamW, **config):
    config = spiel.SpielConfig(num_tunable_weights=40, target_modules=["0"], **config)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.01)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters())
    reselector = spiel.Reselector(model, optimizer, num_steps) if has_reselector else None
    for _ in range(num_steps):
        model(torch.ones(3, 12)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        other.step()
        if reselector is not None:
            reselector.step()
    return [str(each.message) for each in recwarn if "no Reselector" in str(each.message)]


@pytest.mark.parametrize("optimizer", [spiel.SpielAdamW, torch.optim.AdamW])
def test_deltas_that_nobody_moves_are_told_of_once(fresh, recwarn, optimizer):
    (told,) = told_after(45, recwarn, optimizer=optimizer)
    assert told.startswith("SpIEL's deltas have taken 21 optimizer steps, and no Reselector")
    assert "callbacks=[spiel.SpielCallback()]" in told
    assert told_after(45, recwarn, optimizer=optimizer) == [told]


def test_other_hooks_of_all_optimizers_are_left_alone(fresh, recwarn):
    """torch goes through a dict of them, which must not change meanwhile."""
    config = spiel.SpielConfig(num_tunable_weights=40, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)), config)
    calls = []
    hook = register_optimizer_step_post_hook(lambda *_: calls.append(None))
    try:
        assert len(told_after(45, recwarn)) == 1
    finally:
        hook.remove()
    assert len(calls) == 2 * 45


def test_nothing_is_said_before_the_second_reselection(fresh, recwarn):
    assert told_after(20, recwarn) == []


def test_nothing_is_said_of_deltas_that_shall_stay(fresh, recwarn):
    assert told_after(45, recwarn, initial_reselection_rate=0.0) == []
    assert fresh._hook is None


def test_nothing_is_said_where_there_is_a_reselector(fresh, recwarn):
    assert told_after(45, recwarn, has_reselector=True) == []
    assert fresh._hook is None
    assert told_after(45, recwarn) == []  # it is known


def test_an_adapter_for_inference_watches_nobody(fresh, recwarn, tmp_path):
    config = spiel.SpielConfig(num_tunable_weights=40, target_modules=["0"])
    peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)), config).save_pretrained(tmp_path)
    fresh.forget()
    fresh._is_known = False
    peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(12, 12)), tmp_path)
    assert fresh._hook is None
