"""Growth windows: which micro-batch chooses the candidates, and what counts as a step."""

import peft
import pytest
import torch
from torch import nn

import spiel
from spiel import ops
from spiel.ops.blocked import largest_gradients
from spiel.support import random_support
from spiel.window import GradientWindow, end_step


class Experts(nn.Module):
    """Three layers, of which the middle one is left out when it is told so."""

    def __init__(self):
        super().__init__()
        self.first, self.expert, self.last = (nn.Linear(12, 12) for _ in range(3))

    def forward(self, x, use_expert=True):
        x = torch.tanh(self.first(x))
        if use_expert:
            x = torch.tanh(self.expert(x))
        return self.last(x)


NAMES = ["first", "expert", "last"]
X = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))


def make(growth="ag", num_deltas=(20, 5, 20), optimizer=None):
    torch.manual_seed(0)
    config = spiel.SpielConfig(
        growth=growth,
        target_modules=NAMES,
        num_deltas=dict(zip(NAMES, num_deltas, strict=True)),
        reselection_steps=5,
        selection_accumulation_steps=3,
    )
    model = peft.get_peft_model(Experts(), config)
    optimizer = optimizer or {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth]
    optimizer = optimizer(model, lr=0.01)
    return model, optimizer, spiel.Reselector(model, optimizer, 20)


def step(optimizer, reselector):
    optimizer.step()
    optimizer.zero_grad()
    reselector.step()


def loss_of(model, x=X, **kwargs):
    return model(x, **kwargs).square().sum()


@pytest.mark.parametrize("x", [X * 0, X[:0], X * float("nan")], ids=["zero", "empty", "nan"])
def test_a_micro_batch_without_a_gradient_does_not_choose(x):
    model, optimizer, reselector = make()
    (loss_of(model, x) * (0 if len(x) else 1)).backward()
    assert all(window.candidates is None for window in reselector.windows.values())
    optimizer.zero_grad()
    loss_of(model).backward()
    fresh, _, other = make()
    loss_of(fresh).backward()
    for name, window in reselector.windows.items():
        assert torch.equal(window.candidates, other.windows[name].candidates)


def test_a_weight_that_never_had_a_gradient_keeps_its_support(recwarn):
    model, optimizer, reselector = make()
    before = spiel.get_deltas(model)
    for _ in range(3):
        (loss_of(model) * 0).backward()
        step(optimizer, reselector)
    (told,) = [str(each.message) for each in recwarn if "no gradient" in str(each.message)]
    assert f"the deltas of {len(before)} of {len(before)} modules in the first" in told
    for name, (indices, _) in spiel.get_deltas(model).items():
        assert torch.equal(indices, before[name][0])


def test_a_step_that_is_not_finite_does_not_count():
    model, optimizer, reselector = make()
    loss_of(model).backward()
    step(optimizer, reselector)
    (loss_of(model) * float("nan")).backward()
    optimizer.zero_grad()  # the caller drops a bad batch, and tells nobody
    loss_of(model).backward()
    step(optimizer, reselector)
    for window in reselector.windows.values():
        assert window.num_steps == 1
        assert bool(window.sums.isfinite().all())
        assert bool(window.squares.isfinite().all())
    loss_of(model).backward()
    step(optimizer, reselector)
    assert all(bool(v.isfinite().all()) for _, v in spiel.get_deltas(model).values())


def test_a_pass_that_never_reached_the_optimizer_spoils_no_other_module(recwarn):
    """Another module's step would otherwise count without the clipping that the optimizer saw."""
    model, optimizer, reselector = make()
    loss_of(model).backward()
    step(optimizer, reselector)
    (loss_of(model, use_expert=False) * float("nan")).backward()
    optimizer.zero_grad()
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    before = {name: window.sums.clone() for name, window in reselector.windows.items()}
    step(optimizer, reselector)
    (told,) = [str(each.message) for each in recwarn if "never reached" in str(each.message)]
    assert "call reselector.skip_step() along with zero_grad()" in told
    for name, window in reselector.windows.items():
        assert window.num_steps == 1
        assert torch.equal(window.sums, before[name])


def test_where_no_scale_can_be_measured_the_last_one_holds():
    """As of fp16 training, where the active weights have no gradient of their own just now."""
    model, optimizer, reselector = make()
    for x in (X, X * 0):
        loss = loss_of(model, x) * 1024
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 1024
                parameter.grad *= bool(x.any())
        for window in reselector.windows.values():
            window.sample *= bool(x.any())
        step(optimizer, reselector)
        assert reselector._scale == pytest.approx(1 / 1024)


def test_gradients_of_deltas_are_not_formed_for_who_wants_those_of_inputs_alone():
    model, _, reselector = make()
    reselector.close()
    x = X.clone().requires_grad_()
    before = ops.backend_calls.total()
    torch.autograd.grad(loss_of(model, x), x)
    assert ops.backend_calls.total() == before
    loss_of(model, x).backward()
    assert ops.backend_calls.total() > before


def test_gradients_of_inputs_alone_are_not_observed():
    model, _, reselector = make()
    x = X.clone().requires_grad_()
    torch.autograd.grad(loss_of(model, x), x)
    assert all(window.candidates is None for window in reselector.windows.values())
    deltas = [p for p in model.parameters() if p.requires_grad]
    torch.autograd.grad(loss_of(model, x), deltas)
    assert all(window.candidates is not None for window in reselector.windows.values())


def test_the_scale_is_measured_whichever_module_is_used():
    sums = []
    for scale in (1, 1024):
        model, optimizer, reselector = make()
        (loss_of(model, use_expert=False) * scale).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        step(optimizer, reselector)
        sums.append(reselector.windows["last"].sums)
    torch.testing.assert_close(*sums)


def test_the_scale_of_one_step_does_not_reach_the_next():
    model, optimizer, reselector = make()
    loss_of(model).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    step(optimizer, reselector)
    window = reselector.windows["last"]
    before = window.sums.clone()
    loss_of(model, use_expert=False).backward()
    expected = window.step_gradient.clone()
    step(optimizer, reselector)
    torch.testing.assert_close(window.sums - before, expected)


def test_a_window_keeps_a_small_sample_of_the_active_gradient():
    for k in (1, 63, 64, 127, 1000, 100_000):
        window = GradientWindow(torch.zeros(k))
        window.observe(torch.ones(1, 400), torch.ones(1, 400), random_support(k, 400 * 400))
        assert 1 <= len(window.sample) < 128
        window.skip_step()
        assert window.sample is None


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_a_module_without_deltas_trains_and_reselects(growth):
    model, optimizer, reselector = make(growth, num_deltas=(20, 0, 20))
    for _ in range(9):
        loss_of(model).backward()
        step(optimizer, reselector)
    assert len(spiel.get_deltas(model)["expert"][0]) == 0


def test_no_candidates_of_no_deltas():
    indices, values = largest_gradients(X, X, 0)
    assert len(indices) == len(values) == 0


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_a_module_that_is_never_used_keeps_its_support(growth, recwarn):
    model, optimizer, reselector = make(growth)
    before = spiel.get_deltas(model)
    for _ in range(9):
        loss_of(model, use_expert=False).backward()
        step(optimizer, reselector)
    (told,) = [str(each.message) for each in recwarn if "no gradient" in str(each.message)]
    assert f"of 1 of {len(before)} modules" in told and "they stay as they are: expert." in told
    after = spiel.get_deltas(model)
    assert torch.equal(before["expert"][0], after["expert"][0])
    assert not torch.equal(before["last"][0], after["last"][0])


@pytest.mark.parametrize("backend", ["compiled", "blocked"])
def test_what_is_looked_up_once_is_of_the_support_and_the_candidates_there_are_now(backend):
    torch.manual_seed(0)
    left, right = torch.randn(2, 30, 12).unbind()
    wanted = left.T @ right
    supports = [random_support(10, 144) for _ in range(3)]
    window = GradientWindow(torch.zeros(10))
    with ops.use_backend(backend):
        window.observe(left, right, supports[0])
        for indices in (supports[0], supports[0].copy_(supports[1]), supports[2]):
            for candidates in (window.candidates, random_support(10, 144)):
                window.candidates, window.step_gradient = candidates, None
                for _ in range(2):
                    found = window.observe(left, right, indices)
                    torch.testing.assert_close(found, wanted.view(-1)[indices])
                own = window.step_gradient
                torch.testing.assert_close(own, 2 * wanted.view(-1)[candidates])


def observed(num_deltas):
    """A window of a dense weight of that many deltas, after one micro-batch."""
    window = GradientWindow(torch.nn.Parameter(torch.zeros(num_deltas)), lambda _: False)
    window.observe(torch.ones(2, num_deltas), torch.ones(2, 1), torch.arange(num_deltas))
    return window


def test_a_sample_does_not_hold_the_gradient_that_it_is_of():
    window = observed(100_000)
    assert window.sample is not None
    assert window.sample.untyped_storage().nbytes() < 100_000


def test_a_step_without_a_gradient_forgets_its_sample():
    window = observed(10)
    end_step([window])
    assert window.sample is None
