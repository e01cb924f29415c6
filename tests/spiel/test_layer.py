"""Live weights: what the base weight holds, when, and what backward does with it."""

import copy

import numpy as np
import peft
import pytest
import torch
from torch import nn

import spiel
from spiel.model import spiel_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "conv1d", "transposed"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def base_weights(model):
    """The base model's parameters, as they are in memory now, by their names in it."""
    layers = spiel_layers(model)[1]
    return {f"{n}.weight": layer.base_layer.weight.detach().clone() for n, layer in layers.items()}


def assert_pristine(model, base):
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, base.get_parameter(name)), name


def assert_live(model, base):
    """Every weight holds round(W0 + delta), and nothing else differs from W0."""
    for name, (indices, values) in spiel.get_deltas(model).items():
        expected = base.get_parameter(f"{name}.weight").detach().clone().contiguous()
        flat = expected.view(-1)
        sums = flat[indices.long()] + values
        flat[indices.long()] = sums.to(flat.dtype)
        assert torch.equal(base_weights(model)[f"{name}.weight"], expected), name


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


def set_by_numpy(deltas):
    deltas.detach().numpy()[:] += 0.5


def set_by_data(deltas):
    deltas.data = torch.randn(len(deltas))


def set_by_optimizer(deltas):
    deltas.grad = torch.randn(len(deltas))
    torch.optim.SGD([deltas], lr=0.1).step()


def set_by_fused_optimizer(deltas):
    deltas.grad = torch.randn(len(deltas))
    torch.optim.AdamW([deltas], lr=0.1, fused=True).step()


@pytest.mark.parametrize(
    "change", [set_by_numpy, set_by_data, set_by_optimizer, set_by_fused_optimizer]
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_follow_the_deltas_whatever_changed_them(
    two_layers, adapt, change, training, dtype
):
    base = two_layers(dtype=dtype)
    model = adapt(copy.deepcopy(base), density=0.3).train(training)
    x = torch.randn(4, 12, dtype=dtype)
    for _ in range(2):
        with torch.set_grad_enabled(training):
            before = model(x)
        for layer in spiel_layers(model)[1].values():
            change(layer.spiel_deltas["default"])
        with torch.set_grad_enabled(training):
            after = model(x)
        assert not torch.equal(before, after)
        assert_live(model, base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tiny_updates_add_up(two_layers, adapt, dtype):
    """Defect 12: each update is far below the weight's resolution, a thousand are not."""
    base = two_layers(dtype=dtype)
    base.first.weight.data.fill_(1.0)
    model = adapt(copy.deepcopy(base), scale=0, target_modules=["first"])
    layer = spiel_layers(model)[1]["first"]
    deltas, x = layer.spiel_deltas["default"], torch.randn(2, 12, dtype=dtype)
    optimizer = torch.optim.SGD([deltas], lr=1e-5)
    for _ in range(1000):
        deltas.grad = torch.full_like(deltas, -1.0)
        optimizer.step()
        model(x)
    changed = layer.base_layer.weight.view(-1)[layer.spiel_indices["default"].long()]
    assert torch.equal(changed, (torch.ones(len(deltas)) + deltas).to(dtype))
    assert (changed > 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_out_restores_the_weights_bit_for_bit(two_layers, adapt, fill, dtype, kind):
    base = two_layers(kind, dtype)
    model = adapt(copy.deepcopy(base), density=0.3)
    config = spiel.SpielConfig(density=0.2)
    x = torch.randn(4, 12, dtype=dtype)
    model(x)
    assert_live(model, base)
    with model.disable_adapter():
        assert_pristine(model, base)
        assert torch.equal(model(x), base(x))
    for _ in range(3):
        model(x)
        model.merge_adapter()
        assert_live(model, base)
        model.unmerge_adapter()
        assert_pristine(model, base)
    model.add_adapter("other", config)
    fill(model, "other")
    model.set_adapter("other")
    model(x)
    assert_live(model, base)
    model.delete_adapter("other")
    assert_pristine(model, base)
    assert spiel.get_deltas(model).keys() == {"first", "second"}
    model(x)
    plain = model.unload()
    for name, weight in weights(plain).items():
        assert torch.equal(weight, base.get_parameter(name)), name
    assert not any("spiel" in name for name, _ in plain.named_modules())


def test_disabling_nests(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(4, 12)
    adapted = model(x)
    with model.disable_adapter():
        with model.disable_adapter():
            assert torch.equal(model(x), base(x))
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), adapted)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".spiel_deltas." in n)


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


@pytest.mark.parametrize("safe", [False, True])
def test_merge_and_unload_leaves_sums_and_no_adapter(two_layers, adapt, dense, safe):
    base = two_layers()
    for prepare in (lambda m: None, lambda m: m(torch.ones(1, 12)), lambda m: m.merge_adapter()):
        model = adapt(copy.deepcopy(base))
        reference = dense(base, spiel.get_deltas(model))
        layer = spiel_layers(model)[1]["first"]
        prepare(model)
        merged = model.merge_and_unload(safe_merge=safe)
        assert type(merged.first) is nn.Linear
        layer.put_back()  # whoever still holds the old layer can do no harm
        for name, weight in weights(merged).items():
            torch.testing.assert_close(weight, reference.get_parameter(name), rtol=0, atol=1e-7)


def test_merging_only_an_inactive_adapter_does_not_keep_the_active_one(two_layers, adapt, fill):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model.add_adapter("other", spiel.SpielConfig(density=0.2, target_modules=["second"]))
    fill(model, "other")
    model(torch.randn(2, 12))
    merged = model.merge_and_unload(adapter_names=["other"])
    assert torch.equal(merged.first.weight, base.first.weight)
    assert not torch.equal(merged.second.weight, base.second.weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_what_is_not_finite(two_layers, adapt, fill, value):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model.add_adapter("broken", spiel.SpielConfig(density=0.1))
    layer = spiel_layers(model)[1]["first"]
    layer.spiel_deltas["broken"].data[0] = value
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter broken seems to be broken .*first"):
        model.merge_adapter(adapter_names=["broken"], safe_merge=True)
    assert_live(model, base)
    assert layer.merged_adapters == ["default"]
    model.unmerge_adapter()
    assert_pristine(model, base)


def test_safe_merge_refuses_an_overflow(two_layers, adapt):
    model = adapt(two_layers(dtype=torch.float16), scale=1e6)
    with pytest.raises(ValueError, match="NaNs detected in the merged weights"):
        model.merge_and_unload(safe_merge=True)


def test_merging_twice_doubles_nothing(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model.merge_adapter()
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_live(model, base)
    deltas = spiel_layers(model)[1]["first"].spiel_deltas["default"]
    deltas.data.zero_()  # merged weights stay as they are
    model(torch.randn(2, 12)).sum()
    assert deltas.grad is None
    model.unmerge_adapter()
    assert_pristine(model, base)


def test_the_deltas_stay_fp32_when_the_model_is_cast(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    before = spiel.get_deltas(model)
    model(torch.randn(2, 12))
    for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
        model.to(dtype)
        base.to(dtype)
        model(torch.randn(2, 12, dtype=dtype)).sum().backward()
        assert_live(model, base)
        for name, (_, values) in spiel.get_deltas(model).items():
            assert values.dtype == torch.float32
            assert torch.equal(values, before[name][1])
    model.merge_adapter()
    model.to(torch.bfloat16)
    assert_live(model, base.to(torch.bfloat16))
    model.unmerge_adapter()
    assert_pristine(model, base)


def test_moving_to_another_device_and_back(two_layers, adapt):
    model = adapt(two_layers())
    model(torch.randn(2, 12))
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.randn(2, 12, device="meta")).shape == (2, 6)
    model.to_empty(device="cpu")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cpu"}


def test_an_offloaded_weight_is_told(two_layers, adapt):
    model = adapt(two_layers())
    model.base_model.model.first.base_layer.to("meta")
    with pytest.raises(RuntimeError, match="first: the weight is offloaded"):
        model(torch.randn(2, 12))


def test_a_weight_that_was_replaced_gets_the_deltas_too(two_layers, adapt):
    base, other = two_layers(), two_layers(seed=5)
    model = adapt(copy.deepcopy(base))
    model(torch.randn(2, 12))
    layer = spiel_layers(model)[1]["first"]
    old, new = layer.base_layer.weight, nn.Parameter(other.first.weight.detach().clone())
    layer.base_layer.weight = new
    model(torch.randn(2, 12))
    assert torch.equal(old, base.first.weight)
    layer.put_back()
    assert torch.equal(new, other.first.weight)


def test_writing_into_live_indices_is_told(two_layers, adapt):
    model = adapt(two_layers())
    model(torch.randn(2, 12))
    layer = spiel_layers(model)[1]["first"]
    layer.spiel_indices["default"].add_(1)
    with pytest.raises(RuntimeError, match=r"use spiel\.set_support"):
        model.state_dict()


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


def test_deterministic_algorithms_are_enough(two_layers, adapt):
    model = adapt(two_layers())
    torch.use_deterministic_algorithms(True)
    try:
        model(torch.randn(2, 12)).sum().backward()
        model.merge_adapter()
        model.unmerge_adapter()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_first_then_training(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(2, 12)
    with torch.inference_mode():
        out = model(x)
    torch.testing.assert_close(model(x), out.clone())
    model(x).sum().backward()
    with model.disable_adapter():
        assert_pristine(model, base)


def test_compiled_forward_and_backward(two_layers, adapt):
    model = adapt(two_layers())
    x = torch.randn(4, 12)
    model(x).square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(3):
        model.zero_grad()
        compiled(x).square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(found, wanted)
    spiel_layers(model)[1]["first"].spiel_deltas["default"].data += 1
    torch.testing.assert_close(compiled(x), model(x))


def saved_bytes(run, model):
    """Bytes of distinct storages that autograd keeps, those of the model itself left out."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # the graph, and with it every storage in `kept`, stays alive to the end
    total = sum(storage.nbytes() for storage in kept.values())
    loss.backward()
    return total


def test_autograd_keeps_only_the_layers_input(two_layers, adapt):
    model = adapt(nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 6)))
    x = torch.randn(7, 12)
    inputs = 7 * 12 * 4 + 7 * 16 * 4
    assert saved_bytes(lambda: model(x).sum(), model) == inputs


@pytest.mark.parametrize("autocast", [False, True])
def test_autograd_keeps_no_more_than_with_lora(llama, adapt, autocast):
    ids = torch.randint(3, 48, (4, 32))

    def measure(model):
        def run():
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                return model(input_ids=ids, labels=ids).loss

        return saved_bytes(run, model.train())

    shape = {"hidden_size": 64, "intermediate_size": 172}
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    lora_bytes = measure(peft.get_peft_model(llama(**shape), lora))
    spiel_bytes = measure(adapt(llama(**shape), task_type="CAUSAL_LM", density=0.1))
    assert 0 < spiel_bytes <= 1.05 * lora_bytes
