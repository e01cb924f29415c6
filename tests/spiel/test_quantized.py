"""SpIEL on weights that bitsandbytes keeps in 4 bits."""

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import nn

import spiel
from spiel.model import spiel_layers


def quantized(quant_type="nf4", double=True, bias=True, compute_dtype=None, dtype=torch.float32):
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        64,
        48,
        bias=bias,
        compute_dtype=compute_dtype,
        compress_statistics=double,
        quant_type=quant_type,
    )
    model = nn.Sequential(layer.to("cpu"), nn.Linear(48, 4)).requires_grad_(False).to(dtype)
    return model


def adapted(base, k=100):
    config = spiel.SpielConfig(num_tunable_weights=k, target_modules=["0"])
    model = peft.get_peft_model(base, config)
    (deltas,) = (p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        deltas.copy_(torch.randn(k))
    return model, deltas


def dense_copy(model):
    """The same model with the weight dequantised, the deltas added and a gradient kept."""
    layer = model.base_model.model[0].base_layer
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    indices, values = spiel.get_deltas(model)["0"]
    weight.view(-1)[indices.long()] += values.to(weight.dtype)
    dense = nn.Linear(64, 48, bias=layer.bias is not None)
    dense.weight.data = weight
    if layer.bias is not None:
        dense.bias.data = layer.bias.data
    return nn.Sequential(dense, model.base_model.model[1]), indices


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_forward_and_backward_are_those_of_the_dequantised_weight(quant_type, double, bias):
    model, deltas = adapted(quantized(quant_type, double, bias))
    dense, indices = dense_copy(model)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    model(x).square().sum().backward()
    dense(y).square().sum().backward()
    torch.testing.assert_close(model(x), dense(y))
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(deltas.grad, dense[0].weight.grad.view(-1)[indices.long()])


def test_second_derivatives_by_inputs_are_those_of_the_dequantised_weight():
    model, deltas = adapted(quantized())
    dense, _ = dense_copy(model)
    x = torch.randn(3, 5, 64, requires_grad=True)

    def penalty(of):
        (by_x,) = torch.autograd.grad(of(x).square().sum(), x, create_graph=True)
        return by_x.square().sum()

    (found,), (expected,) = (torch.autograd.grad(penalty(each), x) for each in (model, dense))
    torch.testing.assert_close(found, expected)
    with pytest.raises(RuntimeError, match="no second derivative by the deltas"):
        torch.autograd.grad(penalty(model), deltas)


def test_evaluating_first_does_not_spoil_training():
    """bitsandbytes repacks weights in place at the first forward in eval mode on some CPUs."""
    base = quantized()
    model, deltas = adapted(base)
    x = torch.randn(5, 64)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(x)
    with torch.no_grad():
        before = model(x)
    model.train()
    y = x.clone().requires_grad_()
    out = model(y)
    torch.testing.assert_close(out, before)
    out.sum().backward()
    assert y.grad is not None
    assert deltas.grad.abs().sum() > 0


def test_disabling_gives_the_quantised_model_and_the_packed_weight_never_changes():
    base = quantized()
    packed = base[0].weight.data.clone()
    x = torch.randn(5, 64)
    expected = base.train()(x)
    model, _ = adapted(base)
    model.train()
    assert not torch.allclose(model(x), expected)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected)
    assert torch.equal(base[0].weight.data, packed)
    assert torch.equal(model.unload()[0].weight.data, packed)


def test_merging_is_refused_with_what_to_do_instead():
    model, _ = adapted(quantized())
    with pytest.raises(ValueError, match=r"4-bit weight of 0.*Keep the adapter.*dequantised"):
        model.merge_and_unload()


def test_refused_merging_leaves_float_layers_beside_as_they_were(adapt):
    model = adapt(nn.Sequential(nn.Linear(8, 64), *quantized()))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="does not merge into the 4-bit weight of 1"):
            merge()
        layers = spiel_layers(model)[1]
        assert len(layers) == 3
        assert not any(layer.merged for layer in layers.values())


def test_autocast_and_a_compute_dtype():
    model, deltas = adapted(quantized(compute_dtype=torch.bfloat16))
    x = torch.randn(5, 64)
    out = model(x)
    assert out.dtype == torch.float32
    dense, _ = dense_copy(model)
    torch.testing.assert_close(out, dense(x), rtol=0.05, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
    assert torch.isfinite(deltas.grad).all()


def test_it_trains_with_reselection_and_is_saved_and_loaded(tmp_path):
    model, _ = adapted(quantized())
    optimizer = spiel.SpielAdamW(model, lr=0.02)
    reselector = spiel.Reselector(model, optimizer, total_steps=60)
    x, y = torch.randn(32, 64), torch.randn(32, 4)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(), tmp_path)
    torch.testing.assert_close(loaded.eval()(x), model.eval()(x))


def test_a_compiled_model_computes_what_it_does_without():
    model, deltas = adapted(quantized())
    gradients = []
    for forward in (model, torch.compile(model, backend="aot_eager")):
        forward(torch.ones(5, 64)).square().sum().backward()
        gradients.append(deltas.grad)
        deltas.grad = None
    torch.testing.assert_close(*gradients)


def test_density_counts_the_weights_that_packed_bytes_stand_for():
    config = spiel.SpielConfig(density=0.1, target_modules=["0"])
    model = peft.get_peft_model(quantized(bias=False), config)
    num_parameters = 64 * 48 + 48 * 4 + 4
    assert model.peft_config["default"].num_deltas == {"0": int(0.1 * num_parameters)}


def test_deterministic_algorithms_are_enough():
    model, deltas = adapted(quantized())
    torch.use_deterministic_algorithms(True)
    try:
        model(torch.randn(5, 64)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert bool(deltas.grad.any())
