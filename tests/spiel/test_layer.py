"""SpielLinear forward and backward: against a dense reference, in bytes kept, and compiled."""

import contextlib
import copy
import weakref

import numpy as np
import peft
import pytest
import torch
from torch import nn

import spiel
from spiel.delta_layer import layer_of
from spiel.model import spiel_layers
from suites.measure import saved_for_backward_bytes

KINDS = ["linear", "conv1d", "transposed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (3, 5, 12), (0, 12), (2, 0, 12)])
def test_forward_and_backward_equal_the_dense_reference(two_layers, adapt, dense, kind, shape):
    base = two_layers(kind)
    model = adapt(copy.deepcopy(base), density=0.3)
    reference = dense(base, spiel.get_deltas(model))
    x = torch.randn(shape, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, expected = model(x), reference(y)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    layers = spiel_layers(model)[1]
    for name, (indices, _) in spiel.get_deltas(model).items():
        gradient = layers[name].spiel_deltas["default"].grad
        wanted = reference.get_submodule(name).weight.grad.reshape(-1)[indices.long()]
        torch.testing.assert_close(gradient, wanted)
        assert layers[name].base_layer.weight.grad is None
        assert layers[name].base_layer.bias.grad is None


def test_disabling_before_backward_spoils_no_gradient(two_layers, adapt, dense):
    """As preference training does: policy forward, reference forward, then backward."""
    base = two_layers()
    model = adapt(copy.deepcopy(base), density=0.5, scale=1.0)
    reference = dense(base, spiel.get_deltas(model))
    x = torch.randn(4, 12, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out = model(x)
    with model.disable_adapter(), torch.no_grad():
        plain = model(x)
    (out - plain).square().sum().backward()
    (reference(y) - plain).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)

    x.grad, y.grad = None, None  # and with a gradient through the disabled model too
    with model.disable_adapter():
        plain = model(x)
    (model(x) * plain).sum().backward()
    (reference(y) * base(y)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("between", ["state_dict", "deepcopy", "set_adapter"])
def test_putting_the_weights_back_before_backward_spoils_no_gradient(two_layers, adapt, between):
    model = adapt(two_layers(), density=0.5, scale=1.0)
    gradients = []
    for interrupted in (False, True):
        x = torch.ones(4, 12, requires_grad=True)
        loss = model(x).square().sum()
        if interrupted:
            {
                "state_dict": model.state_dict,
                "deepcopy": lambda: copy.deepcopy(model),
                "set_adapter": lambda: model.set_adapter("default"),
            }[between]()
            assert spiel_layers(model)[1]["first"].live_adapters == ()
        loss.backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_two_forward_passes_before_one_backward(two_layers, adapt, dense):
    base = two_layers()
    model = adapt(copy.deepcopy(base), density=0.3)
    reference = dense(base, spiel.get_deltas(model))
    x, y = torch.randn(4, 12), torch.randn(3, 12)
    (model(x).sum() * model(y).sum()).backward()
    (reference(x).sum() * reference(y).sum()).backward()
    for name, layer in spiel_layers(model)[1].items():
        indices = layer.spiel_indices["default"].long()
        wanted = reference.get_submodule(name).weight.grad.view(-1)[indices]
        torch.testing.assert_close(layer.spiel_deltas["default"].grad, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_may_be_changed_in_place(two_layers, adapt, kind):
    model = adapt(two_layers(kind))
    x = torch.randn(4, 12)
    model(x).mul(2).sum().backward()
    wanted = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    out = model(x)
    out *= 2
    out.sum().backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == 2
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_a_hook_may_keep_the_base_layers_output(two_layers, adapt):
    model, kept = adapt(two_layers()), []
    layer = spiel_layers(model)[1]["first"]
    layer.base_layer.register_forward_hook(lambda _, args, out: kept.append((out * out).sum()))
    x = torch.randn(4, 12, requires_grad=True)
    (model(x).sum() + kept[0]).backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_active_adapters_add_up_where_they_overlap(two_layers, adapt, dense, fill, dtype):
    base = two_layers(dtype=dtype)
    model = adapt(copy.deepcopy(base), density=0.6)
    model.add_adapter("other", spiel.SpielConfig(density=0.6))
    fill(model, "other")
    model.base_model.set_adapter(["default", "other"])
    reference = dense(base, spiel.get_deltas(model, "default"), spiel.get_deltas(model, "other"))
    x = torch.randn(4, 12, dtype=dtype)
    if dtype == torch.float32:
        model(x).square().sum().backward()
        reference(x).square().sum().backward()
        for name, layer in spiel_layers(model, "other")[1].items():
            dense_gradient = reference.get_submodule(name).weight.grad.view(-1)
            for adapter, indices in layer.spiel_indices.items():
                gradient = layer.spiel_deltas[adapter].grad
                torch.testing.assert_close(gradient, dense_gradient[indices.long()])
    model(x)
    for name, layer in spiel_layers(model, "other")[1].items():
        overlap = np.intersect1d(*(i.numpy() for i in layer.spiel_indices.values()))
        assert len(overlap) > 0
        both = reference.get_submodule(name).weight  # rounded once, not once for each adapter
        torch.testing.assert_close(layer.base_layer.weight, both, rtol=1e-6, atol=1e-7)
    model.base_model.set_adapter("other")
    model(x)
    model.base_model.set_adapter([])
    torch.testing.assert_close(model(x), base(x), rtol=0, atol=0)


def test_autocast_follows_the_deltas_and_sums_in_fp32(two_layers, adapt):
    model = adapt(two_layers())
    x = torch.randn(4, 12)
    gradients = []
    for inside in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        layer = spiel_layers(model)[1]["first"]
        gradients.append(layer.spiel_deltas["default"].grad)
        assert gradients[-1].dtype == torch.float32
    assert torch.equal(*gradients)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(x)
        layer.spiel_deltas["default"].data += 1
        assert not torch.equal(model(x), before)


def input_gradient(model, x):
    """Of a loss that is not linear, with its graph."""
    return torch.autograd.grad(model(x).square().sum(), x, create_graph=True)[0]


def test_gradients_can_be_asked_for_with_a_graph_but_have_none(two_layers, adapt):
    model = adapt(two_layers())
    x = torch.randn(4, 12, requires_grad=True)
    deltas = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(x).square().sum(), deltas)
    found = torch.autograd.grad(model(x).square().sum(), deltas, create_graph=True)
    assert all(torch.equal(*each) for each in zip(found, expected, strict=True))
    for wanted in (deltas, [x]):
        with pytest.raises(RuntimeError, match="no second derivative by the deltas"):
            torch.autograd.grad(found[0].sum(), wanted, allow_unused=True, retain_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative by the deltas"):
        input_gradient(model, x).square().sum().backward()  # it depends on the deltas
    by_x = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]  # of a linear loss, too
    with pytest.raises(RuntimeError, match="no second derivative by the deltas"):
        torch.autograd.grad(by_x.sum(), deltas)


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("is_enabled", [False, True])
def test_second_derivatives_by_inputs_are_those_of_the_weights(
    two_layers, adapt, dense, is_trained, is_enabled
):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    for layer in spiel_layers(model)[1].values():
        layer.spiel_deltas["default"].data.normal_()
        layer.spiel_deltas["default"].requires_grad_(is_trained)
    x = torch.randn(4, 12, requires_grad=True)
    reference = dense(base, spiel.get_deltas(model) if is_enabled else {})
    with contextlib.nullcontext() if is_enabled else model.disable_adapter():
        found = torch.autograd.grad(input_gradient(model, x).square().sum(), x)
    expected = torch.autograd.grad(input_gradient(reference, x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_what_backward_found_out_of_a_support_goes_with_it(two_layers, adapt, dense):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    name, layer = next(iter(spiel_layers(model)[1].items()))
    x = torch.randn(4, 12)
    model(x).square().sum().backward()
    before = weakref.ref(layer.spiel_indices["default"])
    k, numel = len(before()), layer.shape[0] * layer.shape[1]
    spiel.set_support(model, {name: torch.arange(numel - k, numel)})
    assert before() is None
    model.zero_grad()
    model(x).square().sum().backward()
    reference = dense(base, spiel.get_deltas(model))
    reference(x).square().sum().backward()
    expected = reference.get_submodule(name).weight.grad.reshape(-1)[-k:]
    torch.testing.assert_close(layer.spiel_deltas["default"].grad, expected)


def test_compiled_training_goes_as_it_does_without(two_layers, adapt):
    """Through a reselection, which replaces supports and lets observers come and go."""
    runs = []
    for compiles in (False, True):
        model = adapt(two_layers(), reselection_steps=3, selection_accumulation_steps=2)
        forward = torch.compile(model, backend="aot_eager") if compiles else model
        optimizer = spiel.SpielAdamW(model, lr=0.01)
        reselector = spiel.Reselector(model, optimizer, total_steps=6)
        torch.manual_seed(2)
        for x in torch.randn(6, 4, 12):
            forward(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            reselector.step()
        x = torch.ones(4, 12)
        with model.disable_adapter():
            torch.testing.assert_close(forward(x), two_layers()(x))
        model.merge_adapter()
        runs.append((spiel.get_deltas(model), forward(x)))
    torch.testing.assert_close(runs[0], runs[1])


def test_autograd_keeps_only_the_layers_input(adapt):
    model = adapt(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 6)))
    inputs = 7 * 12 * 4 + 7 * 16 * 4
    assert saved_for_backward_bytes(model, {"input": torch.randn(7, 12)}) == inputs


@pytest.mark.parametrize("autocast", [False, True])
def test_autograd_keeps_less_than_with_lora(llama, adapt, autocast):
    ids = torch.randint(3, 48, (4, 32))
    shape = {"hidden_size": 64, "intermediate_size": 172}
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    models = [
        peft.get_peft_model(llama(**shape), lora),
        adapt(llama(**shape), task_type="CAUSAL_LM", density=0.1),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        kept = [
            saved_for_backward_bytes(each, {"input_ids": ids, "labels": ids}) for each in models
        ]
    assert 0 < kept[1] < 0.8 * kept[0]


def test_a_cast_along_with_a_move_moves_the_deltas_and_leaves_their_dtype(two_layers, adapt):
    model = adapt(two_layers())
    model.to(device="meta", dtype=torch.bfloat16)
    for layer in spiel_layers(model)[1].values():
        deltas = layer.spiel_deltas["default"]
        assert (deltas.device.type, deltas.dtype) == ("meta", torch.float32)


def test_the_layer_of_deltas_comes_with_their_own_adapter(two_layers, adapt):
    model = adapt(two_layers())
    model.add_adapter("other", spiel.SpielConfig(num_tunable_weights=20))
    model.base_model.set_adapter(["default", "other"])
    model(torch.randn(4, 12))
    for layer in spiel_layers(model, "other")[1].values():
        for name in ("default", "other"):
            assert layer_of(layer.spiel_deltas[name]) == (layer, name)


def test_a_support_that_was_set_is_a_copy(two_layers, adapt):
    model = adapt(two_layers())
    indices = spiel.get_deltas(model)["first"][0]
    given = indices.clone()
    spiel.set_support(model, {"first": given})
    given.zero_()
    assert torch.equal(spiel.get_deltas(model)["first"][0], indices)


def test_a_deleted_adapter_is_no_longer_observed(two_layers, adapt):
    model = adapt(
        two_layers(),
        initial_reselection_rate=0.2,
        reselection_steps=5,
        selection_accumulation_steps=2,
    )
    reselector = spiel.Reselector(model, spiel.SpielAdamW(model, lr=0.01), 20)
    layers = spiel_layers(model)[1].values()
    assert all(layer.observers for layer in layers)
    model.add_adapter("other", spiel.SpielConfig(num_tunable_weights=20))
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not any(layer.observers for layer in layers)
    assert reselector


def test_merged_deltas_that_were_disabled_are_there_again(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(4, 12)
    expected = model(x)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), expected)


def test_a_copy_of_a_merged_model_is_unmerged_though_its_deltas_changed(
    two_layers, adapt, fill, assert_pristine
):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model.merge_adapter()
    other = copy.deepcopy(model)
    fill(other)
    other.unmerge_adapter()
    assert_pristine(other, base)


def test_the_deltas_of_a_copy_know_its_layers(two_layers, adapt):
    copied = copy.deepcopy(adapt(two_layers()))
    copied(torch.randn(4, 12))
    for layer in spiel_layers(copied)[1].values():
        assert layer_of(layer.spiel_deltas["default"]) == (layer, "default")


def test_a_cast_leaves_merged_adapters_merged(two_layers, adapt):
    model = adapt(two_layers())
    model.merge_adapter()
    model.to(torch.bfloat16)
    for layer in spiel_layers(model)[1].values():
        assert layer.merged_adapters == ["default"]
        assert layer.live_adapters == ("default",)


def test_trls_reference_stays_while_the_adapter_trains(two_layers, adapt):
    model = adapt(two_layers())
    model.add_adapter("ref", model.peft_config["default"])
    before = spiel.get_deltas(model, "ref")
    for layer in spiel_layers(model)[1].values():
        assert torch.equal(layer.spiel_deltas["ref"], layer.spiel_deltas["default"])
        with torch.no_grad():
            layer.spiel_deltas["default"].add_(1.0)
    for name, (indices, values) in spiel.get_deltas(model, "ref").items():
        assert torch.equal(indices, before[name][0])
        assert torch.equal(values, before[name][1])
