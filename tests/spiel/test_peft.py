"""What peft promises of every tuner, as its own tests of custom models check it."""

import copy

import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import spiel
from spiel.model import spiel_layers


class Mlp(nn.Module):
    """As in peft's tests: named layers of several kinds around the two that are adapted."""

    def __init__(self, conv1d=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(10)
        self.lin0 = Conv1D(20, 10) if conv1d else nn.Linear(10, 20)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 20, bias=False)
        self.head = nn.Linear(20, 2)

    def forward(self, x):
        x = self.drop(torch.relu(self.lin0(self.norm(x))))
        return self.head(torch.relu(self.lin1(x)))


CASES = [
    {"target_modules": ["lin0"]},
    {"target_modules": ["lin0", "lin1"]},
    {"target_modules": r"lin\d"},
    {"target_modules": ["lin0"], "modules_to_save": ["head"]},
    {"target_modules": ["lin1"], "growth": "ma", "delta_dtype": "bfloat16"},
    {"exclude_modules": ["head"]},
]


def make(case, conv1d=False, k=60, scale=0.0, dtype=torch.float32, adapter="default"):
    torch.manual_seed(0)
    base = Mlp(conv1d).to(dtype)
    torch.manual_seed(1)
    config = spiel.SpielConfig(num_tunable_weights=k, **case)
    model = peft.get_peft_model(base, config, adapter_name=adapter)
    noise(model, scale)
    return model


def noise(model, scale, adapter=""):
    for name, parameter in model.named_parameters():
        if f".spiel_deltas.{adapter}" in name:
            parameter.data.copy_(torch.randn(len(parameter)) * scale)


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["linear", "conv1d"])
def conv1d(request):
    return request.param


X = torch.randn(9, 10, generator=torch.Generator().manual_seed(3))


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does(case, conv1d):
    torch.manual_seed(0)
    base = Mlp(conv1d).eval()
    model = make(case, conv1d).eval()
    assert torch.equal(model(X), base(X))
    noise(model, 1.0)
    assert not torch.allclose(model(X), base(X))
    with model.disable_adapter():
        assert torch.equal(model(X), base(X))


def test_only_the_adapter_is_trainable_and_changes(case, conv1d):
    model = make(case, conv1d)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        for name, parameter in model.named_parameters():
            belongs = ".spiel_" in name or ".modules_to_save." in name
            assert parameter.requires_grad == belongs, name
            assert (parameter.grad is not None) == belongs, name
        optimizer.step()
    model.base_model.disable_adapter_layers()  # takes the deltas out of the weights
    for name, parameter in model.named_parameters():
        belongs = ".spiel_" in name or ".modules_to_save." in name
        assert torch.equal(parameter, before[name]) != belongs, name


def test_numbers_of_parameters(case, capsys):
    model = make(case)
    trainable, total = model.get_nb_trainable_parameters()
    expected = sum(model.peft_config["default"].num_deltas.values())
    expected += 42 if "modules_to_save" in case else 0
    assert trainable == expected
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,} || all params:")


def test_names_types_and_status(case):
    model = make(case)
    assert model.peft_type == "SPIEL"
    assert model.active_adapter == "default"
    assert model.base_model.prefix == "spiel_"
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    assert [layer.name for layer in layers] == list(model.targeted_module_names)
    assert "spiel.SpielLinear" in repr(model)
    for layer in layers:
        assert layer.weight is layer.get_base_layer().weight
        assert layer.bias is layer.get_base_layer().bias
        assert (layer.in_features, layer.out_features) in {(10, 20), (20, 20)}
        dtype = getattr(torch, case.get("delta_dtype", "float32"))
        assert layer.spiel_deltas["default"].dtype == dtype
        assert not layer.supports_lora_conversion()
    status = model.get_model_status()
    assert (status.adapter_model_type, status.enabled) == ("SpielModel", True)
    assert (status.active_adapters, status.merged_adapters) == (["default"], [])
    assert status.requires_grad == {"default": True}
    for layer in model.get_layer_status()[: len(layers)]:
        assert layer.module_type == "spiel.SpielLinear"
        assert layer.available_adapters == ["default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_keeps_the_output_and_unmerging_restores_the_bits(case, conv1d, dtype):
    model = make(case, conv1d, scale=0.5, dtype=dtype).eval()
    x = X.to(dtype)
    with model.disable_adapter():
        plain = model(x)
        before = copy.deepcopy(model.state_dict())
    out = model(x)
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        assert torch.equal(model(x), out)
        assert all(la.merged_adapters == ["default"] for la in spiel_layers(model)[1].values())
        model.unmerge_adapter()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
        assert torch.equal(model(x), out)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    unloaded = copy.deepcopy(model).unload()
    assert torch.equal(unloaded(x), plain) or "modules_to_save" in case
    merged = model.merge_and_unload()
    assert torch.equal(merged(x), out)
    assert not any(isinstance(m, BaseTunerLayer) for m in merged.modules())
    assert not hasattr(merged, "peft_config")


def test_several_adapters_do_not_disturb_each_other():
    model = make({"target_modules": ["lin0"]}, scale=1.0).eval()
    first = model(X)
    model.add_adapter("second", spiel.SpielConfig(num_tunable_weights=80))
    noise(model, 1.0, "second")
    assert torch.equal(model(X), first)  # adding does not activate
    assert [p.requires_grad for n, p in model.named_parameters() if "second" in n] == [False] * 3
    model.set_adapter("second")
    second = model(X)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.endswith(".spiel_deltas.second") for name in trainable)
    model(X).sum().backward()
    assert all((p.grad is not None) == ("second" in n) for n, p in model.named_parameters())
    model.base_model.set_adapter(["default", "second"])
    both = model(X)
    model.base_model.set_adapter(["second", "default"])
    torch.testing.assert_close(model(X), both)
    merged = copy.deepcopy(model).merge_and_unload(adapter_names=["default", "second"])
    torch.testing.assert_close(merged(X), both)
    for adapter, expected in [("default", first), ("second", second)]:
        model.set_adapter(adapter)
        assert torch.equal(model(X), expected)
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=[adapter])
        assert torch.equal(merged(X), expected)


def test_merging_one_after_the_other_and_unmerging_both():
    model = make({"target_modules": ["lin0", "lin1"]}, scale=1.0).eval()
    model.add_adapter("second", spiel.SpielConfig(num_tunable_weights=80))
    noise(model, 1.0, "second")
    model.base_model.set_adapter(["default", "second"])
    both = model(X)
    with model.disable_adapter():
        plain = model(X)
    model.set_adapter("default")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="additionally merging second"):
        model.merge_adapter(adapter_names=["second"])
    assert torch.equal(model(X), both)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), plain)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("second")
    model.delete_adapter("second")
    assert "second" not in repr(model)


def test_deleting_adapters():
    model = make({"target_modules": ["lin0"]}, scale=1.0).eval()
    out = model(X)
    model.add_adapter("inactive", spiel.SpielConfig(num_tunable_weights=8))
    model.delete_adapter("inactive")
    assert torch.equal(model(X), out)
    with pytest.raises(ValueError, match="Adapter unknown does not exist"):
        model.delete_adapter("unknown")
    model.delete_adapter("default")
    torch.manual_seed(0)
    assert torch.equal(model.base_model(X), Mlp().eval()(X))


def test_inference_mode_freezes():
    config = spiel.SpielConfig(num_tunable_weights=60, inference_mode=True)
    model = peft.get_peft_model(Mlp(), config)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(X).requires_grad
    model.set_adapter("default")
    assert model(X).requires_grad
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.set_requires_grad("default")
    model(X).sum().backward()
    assert sum(p.grad is not None for p in model.parameters()) == 3


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_the_deltas_have_the_dtype_of_the_config(tmp_path, autocast_adapter_dtype):
    for delta_dtype in ("float32", "bfloat16", "float16"):
        config = spiel.SpielConfig(num_tunable_weights=60, delta_dtype=delta_dtype)
        model = peft.get_peft_model(
            Mlp().bfloat16(), config, autocast_adapter_dtype=autocast_adapter_dtype
        )
        model.save_pretrained(tmp_path / delta_dtype)
        loaded = peft.PeftModel.from_pretrained(
            Mlp().bfloat16(),
            tmp_path / delta_dtype,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        for adapted in (model, loaded):
            for _, values in spiel.get_deltas(adapted).values():
                assert values.dtype == getattr(torch, delta_dtype)
            adapted(X.bfloat16()).sum()


def test_mixing_adapters_within_a_batch_is_refused():
    model = make({"target_modules": ["lin0"]}).eval()
    with pytest.raises(ValueError, match="cannot mix adapters within a batch"):
        model(X, adapter_names=["default"] * 9)


def test_an_adapter_name_like_the_prefix_works():
    model = make({"target_modules": ["lin0"]}, scale=1.0, adapter="spiel_one")
    assert set(spiel.get_deltas(model)) == {"lin0"}
    model(X).sum().backward()


def test_direct_injection_without_a_peft_model(tmp_path):
    """As transformers' own `add_adapter` does."""
    config = spiel.SpielConfig(num_tunable_weights=60, target_modules=["lin0"])
    base = Mlp().eval()
    plain = base(X)
    model = peft.inject_adapter_in_model(config, base)
    noise(model, 1.0)
    out = model(X)
    assert not torch.allclose(out, plain)
    state = peft.get_peft_model_state_dict(model)
    assert set(state) == {"lin0.spiel_deltas", "lin0.spiel_indices"}
    other = peft.inject_adapter_in_model(config, copy.deepcopy(base), adapter_name="other")
    peft.set_peft_model_state_dict(other, state, adapter_name="other")
    for one, two in zip(
        *(spiel.get_deltas(m, n).values() for m, n in ((model, "default"), (other, "other"))),
        strict=True,
    ):
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
