"""Live weights: what the base weight holds, whatever happens to the deltas and to the model."""

import copy
import threading

import pytest
import torch
from torch import nn

import spiel
from spiel import ops
from spiel.delta_layer import DeltaLayer
from spiel.live import LiveEntries
from spiel.model import spiel_layers
from spiel.ops import transposed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


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
    two_layers, adapt, change, training, dtype, assert_live
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
    """Each update is far below the weight's resolution, a thousand are not."""
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


def test_the_deltas_stay_fp32_when_the_model_is_cast(
    two_layers, adapt, assert_live, assert_pristine
):
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


def test_a_support_that_was_set_in_inference_mode_trains(two_layers, adapt):
    model = adapt(two_layers())
    with torch.inference_mode():
        spiel.set_support(model, {"first": torch.arange(20)})
    model(torch.randn(2, 12)).sum().backward()


def test_deterministic_algorithms_are_enough(two_layers, adapt):
    model = adapt(two_layers())
    torch.use_deterministic_algorithms(True)
    try:
        model(torch.randn(2, 12)).sum().backward()
        model.merge_adapter()
        model.unmerge_adapter()
    finally:
        torch.use_deterministic_algorithms(False)


def test_inference_mode_first_then_training(two_layers, adapt, assert_pristine):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.randn(2, 12)
    with torch.inference_mode():
        out = model(x)
    torch.testing.assert_close(model(x), out.clone())
    model(x).sum().backward()
    with model.disable_adapter():
        assert_pristine(model, base)


def test_other_memory_with_the_pretrained_weight_is_not_written_into(two_layers, adapt):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    x = torch.ones(1, 12)
    wanted = model(x)
    layer = spiel_layers(model)[1]["first"]
    layer.base_layer.weight.data = base.first.weight.detach().clone()
    torch.testing.assert_close(model(x), wanted)
    layer.put_back()
    assert torch.equal(layer.base_layer.weight, base.first.weight)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_that_moved_to_other_memory_are_still_put_back(two_layers, adapt, merged, dtype):
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model(torch.ones(1, 12))
    if merged:
        model.merge_adapter()
    for layer in spiel_layers(model)[1].values():
        layer.base_layer.weight.data = layer.base_layer.weight.data.to(dtype, copy=True)
    model.unmerge_adapter()
    for name, layer in spiel_layers(model)[1].items():
        wanted = base.get_submodule(name).weight.to(dtype)
        assert torch.equal(layer.base_layer.weight, wanted), name


def test_other_memory_with_something_else_is_refused(two_layers, adapt):
    model = adapt(two_layers())
    x = torch.ones(1, 12)
    model(x)
    spiel_layers(model)[1]["first"].base_layer.weight.data = torch.randn(16, 12)
    with pytest.raises(RuntimeError, match=r"which of its entries are pretrained can no longer"):
        model(x)


@pytest.fixture
def count_writes(monkeypatch):
    """Counts how often live entries are written, since the last count."""
    counted = []
    write = LiveEntries.write
    monkeypatch.setattr(
        LiveEntries, "write", lambda entries, deltas: (counted.append(0), write(entries, deltas))
    )

    def count():
        number = len(counted)
        counted.clear()
        return number

    return count


@pytest.fixture(params=[False, True], ids=["on a CPU", "on a GPU"])
def is_late(request, monkeypatch):
    """Whether weights are written when their layer is called, as they are on GPUs."""
    if request.param:
        monkeypatch.setattr(DeltaLayer, "_is_written_late", True)
    return request.param


def test_a_forward_pass_writes_every_weight_once(llama, adapt, count_writes, is_late):
    """Before the first layer runs, or in its turn; not again for each new token of a generation."""
    base = llama()
    model = adapt(copy.deepcopy(base), task_type="CAUSAL_LM")
    num_layers = len(spiel_layers(model)[1])
    tokens = torch.tensor([[1, 5, 7]])
    before = []
    model.base_model.model.model.layers[0].register_forward_pre_hook(
        lambda *_: before.append(count_writes())
    )
    first, then = (0, num_layers) if is_late else (num_layers, 0)
    model(input_ids=tokens)
    assert (before, count_writes()) == ([first], then)
    model.generate(input_ids=tokens, max_new_tokens=5, min_new_tokens=5)
    assert (before[1:], count_writes()) == ([first, then, 0, 0, 0], 0)
    model.base_model.model(input_ids=tokens)  # around peft: each layer looks after itself
    assert (before[6:], count_writes()) == ([0], num_layers)


@pytest.mark.usefixtures("is_late")
def test_a_failed_forward_pass_leaves_layers_to_themselves(two_layers, adapt, count_writes):
    model = adapt(two_layers())
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 5))
    count_writes()
    model.base_model.model(torch.ones(2, 12))
    assert count_writes() == 2


CHANGES = {
    "disabled": (lambda layer: layer.enable_adapters(False), None),
    "another": (lambda layer: layer.set_adapter("other"), "other"),
    "merged": (lambda layer: layer.merge(adapter_names=["other"]), "other"),
    "put back": (lambda layer: layer.put_back(), "default"),
}


@pytest.mark.usefixtures("is_late")
@pytest.mark.parametrize(("change", "expected"), CHANGES.values(), ids=CHANGES)
def test_a_layer_that_changes_within_a_forward_pass(two_layers, adapt, fill, change, expected):
    """Between the write for the whole model and the layer's own turn."""
    base = two_layers()
    model = adapt(copy.deepcopy(base))
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    fill(model, "other")
    layer = model.base_model.model.second
    first = model.base_model.model.first
    first.register_forward_hook(lambda *_: change(layer))
    x = torch.randn(3, 12)
    out = model(x)
    weight = base.second.weight.detach().clone()
    if expected is not None:
        indices, deltas = layer.spiel_indices[expected].long(), layer.spiel_deltas[expected]
        weight.view(-1)[indices] += deltas.detach()
    hidden = torch.tanh(first(x))
    torch.testing.assert_close(out, nn.functional.linear(hidden, weight, base.second.bias))


def test_an_adapter_is_made_and_used_in_inference_mode(two_layers, adapt):
    base = two_layers()
    x = torch.ones(1, 12)
    plain = base(x)
    with torch.inference_mode():
        model = adapt(base)
        out = model(x)
        assert not torch.equal(out, plain)
        with model.disable_adapter():
            assert torch.equal(model(x), plain)
        model.merge_adapter()
        assert torch.equal(model(x), out)


def test_operands_are_let_go_at_the_end_of_backward(adapt):
    torch.manual_seed(0)
    model = adapt(torch.nn.Sequential(torch.nn.Linear(256, 256)), density=0.01)
    kept = []
    deltas = spiel_layers(model)[1]["0"].spiel_deltas["default"]
    with ops.use_backend("sampled"):
        deltas.register_hook(lambda gradient: kept.append(transposed.last_left._kept is not None))
        model(torch.randn(8, 256)).sum().backward()
    assert kept == [True]
    assert transposed.last_left._kept is None
    assert transposed.last_right._kept is None


def test_two_threads_read_the_pretrained_entries_once(two_layers, adapt, monkeypatch):
    """The second must not take the sums that the first wrote for them."""
    base = two_layers()
    model = adapt(copy.deepcopy(base), density=0.3).eval()
    for layer in spiel_layers(model)[1].values():
        set_by_data(layer.spiel_deltas["default"])
    entered, both, done = (threading.Event() for _ in range(3))

    def make(weight, supports):
        if threading.current_thread().name == "second":
            both.set()
            done.wait(10)
        elif not entered.is_set():
            entered.set()
            both.wait(0.5)
        return LiveEntries(weight, supports)

    def run():
        model(torch.randn(4, 12))
        done.set()

    monkeypatch.setattr("spiel.delta_layer.LiveEntries", make)
    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    for thread in threads:
        thread.join()
    found = model.unload().state_dict()
    for name, weight in base.state_dict().items():
        assert torch.equal(found[name], weight)
