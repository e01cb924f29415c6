"""Every way out of live weights restores the pretrained ones bit for bit, in any order."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import nn

import spiel
from spiel.model import spiel_layers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["linear", "conv1d", "transposed"]


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_out_restores_the_weights_bit_for_bit(
    two_layers, adapt, fill, dtype, kind, assert_live, assert_pristine
):
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
        if Version(peft.__version__) >= Version("0.21"):  # before, the inner exit enabled again
            assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), adapted)
    assert all(p.requires_grad for n, p in model.named_parameters() if ".spiel_deltas." in n)


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
def test_safe_merge_refuses_what_is_not_finite(
    two_layers, adapt, fill, value, assert_live, assert_pristine
):
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


def test_merging_twice_doubles_nothing(two_layers, adapt, assert_live, assert_pristine):
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


class Walk:
    """A model with two adapters that is put through operations in any order."""

    def __init__(self, base, adapt, fill):
        self.base, self.fill = base, fill
        self.model = adapt(copy.deepcopy(base), density=0.4)
        self.model.add_adapter("other", spiel.SpielConfig(density=0.3))
        self.graphs = []

    def forward(self):
        x = torch.randn(2, 12, dtype=self.base.first.weight.dtype, requires_grad=True)
        self.graphs.append(self.model(x).sum())

    def backward(self):
        if self.graphs and self.graphs[-1].requires_grad:
            self.graphs.pop().backward()

    def train(self):
        self.fill(self.model, self.model.active_adapters[0])

    def move_support(self):
        adapter = self.model.active_adapters[0]
        layer = spiel_layers(self.model, adapter)[1]["first"]
        if not layer.merged:
            indices = torch.randperm(192)[: len(layer.spiel_deltas[adapter])].sort().values
            spiel.set_support(self.model, {"first": indices}, adapter)

    def merge(self):
        self.model.merge_adapter()

    def unmerge(self):
        self.model.unmerge_adapter()

    def disable(self):
        self.model.base_model.disable_adapter_layers()

    def enable(self):
        self.model.base_model.enable_adapter_layers()

    def switch(self):
        self.model.set_adapter("other" if self.model.active_adapters == ["default"] else "default")

    def use_both(self):
        self.model.base_model.set_adapter(["other", "default"])

    def save(self):
        self.model.state_dict()

    def copy(self):
        self.model = copy.deepcopy(self.model)
        self.graphs = []

    def cast(self):
        self.model.float()
        self.base.float()


STEPS = [name for name in vars(Walk) if not name.startswith("_")]


@pytest.mark.filterwarnings("ignore:Adapter cannot be set", "ignore:A.* merged")
@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.sampled_from(STEPS), max_size=14), dtype=st.sampled_from(DTYPES))
def test_no_order_of_operations_loses_a_bit(
    two_layers, adapt, fill, steps, dtype, assert_live, assert_pristine
):
    walk = Walk(two_layers(dtype=dtype), adapt, fill)
    for step in steps:
        getattr(walk, step)()
    model, base = walk.model, walk.base
    model.unmerge_adapter()
    walk.enable()
    model.set_adapter("default")
    x = torch.randn(2, 12, dtype=base.first.weight.dtype)
    model(x)
    assert_live(model, base)
    with model.disable_adapter():
        assert_pristine(model, base)
    plain = model.unload()
    assert torch.equal(plain(x), base(x))
