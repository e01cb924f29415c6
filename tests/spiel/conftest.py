"""Small models for the tests of spiel; each fixture is a function, so that tests can make several
and choose their dtype.
"""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import spiel
from spiel.model import spiel_layers


class TwoLayers(nn.Module):
    """A Linear with bias and a second layer, 12 -> 16 -> 6, with a non-linearity between."""

    def __init__(self, kind="linear"):
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.second = Conv1D(6, 16) if kind == "conv1d" else nn.Linear(16, 6)
        if kind == "transposed":  # the same values with the strides of a transpose
            self.second.weight.data = self.second.weight.data.t().contiguous().t()
        if kind == "conv1d":
            nn.init.normal_(self.second.bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture(scope="session")
def two_layers():
    def make(kind="linear", dtype=torch.float32, seed=0):
        torch.manual_seed(seed)
        return TwoLayers(kind).to(dtype)

    return make


@pytest.fixture(scope="session")
def llama():
    def make(dtype=torch.float32, seed=0, **changes):
        torch.manual_seed(seed)
        values = {
            "vocab_size": 48,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).to(dtype)

    return make


@pytest.fixture(scope="session")
def adapt():
    """Adapts a model, and fills the deltas with noise of size `scale`."""

    def make(base, scale=0.1, adapter="default", seed=1, task_type=None, **values):
        torch.manual_seed(seed)
        if not values.keys() & {"density", "num_deltas", "num_tunable_weights"}:
            values["density"] = 0.1
        config = spiel.SpielConfig(task_type=task_type, **values)
        model = peft.get_peft_model(base, config, adapter_name=adapter)
        randomize(model, adapter, scale)
        return model

    return make


@pytest.fixture(scope="session")
def fill():
    return randomize


def randomize(model, adapter="default", scale=0.1):
    """Noise in the deltas of an adapter."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".spiel_deltas.{adapter}"):
            parameter.data.copy_(torch.randn(len(parameter)) * scale)


@pytest.fixture(scope="session")
def dense():
    """The dense reference: a copy of the base model with W0 + delta, in which W trains."""

    def make(base, *deltas):
        reference = copy.deepcopy(base).requires_grad_(True)
        for name in deltas[0]:
            weight = reference.get_submodule(name).weight
            sums = weight.detach().double().reshape(-1)
            for indices, values in (adapter[name] for adapter in deltas):
                sums[indices.long()] += values.double()
            weight.data = sums.to(weight.dtype).view_as(weight)
        return reference

    return make


def base_weights(model):
    """The base model's parameters, as they are in memory now, by their names in it."""
    layers = spiel_layers(model)[1]
    return {f"{n}.weight": layer.base_layer.weight.detach().clone() for n, layer in layers.items()}


@pytest.fixture(scope="session")
def assert_pristine():
    def check(model, base):
        for name, weight in base_weights(model).items():
            assert torch.equal(weight, base.get_parameter(name)), name

    return check


@pytest.fixture(scope="session")
def assert_live():
    def check(model, base):
        """Every weight holds round(W0 + delta), and nothing else differs from W0."""
        for name, (indices, values) in spiel.get_deltas(model).items():
            expected = base.get_parameter(f"{name}.weight").detach().clone().contiguous()
            flat = expected.view(-1)
            sums = flat[indices.long()] + values
            flat[indices.long()] = sums.to(flat.dtype)
            assert torch.equal(base_weights(model)[f"{name}.weight"], expected), name

    return check


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Uninitialised floats are NaN, so that what a kernel leaves out is seen."""
    empty = torch.empty

    def nan(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", nan)
