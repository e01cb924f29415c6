"""Inputs made again from what the graph keeps: which of them can be, and that they are the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from spiel import ops, recompute
from spiel.ops.product import formed
from suites.measure import saved_for_backward_bytes

IDS = torch.arange(1, 33).view(2, 16)
SIZE = 8


def frozen(module, dtype):
    torch.manual_seed(1)
    for parameter in module.requires_grad_(False).to(dtype).parameters():
        nn.init.normal_(parameter)
    return module


KNOWN = {
    "product": lambda h: h.tanh() * h.sin(),
    "square": lambda h: h * h,
    "gated": lambda h: F.silu(h) * h.tanh(),
    "scaled": lambda h: (h.tanh() * h.sin()) * 0.3,
    "scaled from the left": lambda h: 0.3 * (h.tanh() * h.sin()),
    "broadcast": lambda h: h.tanh() * h.mean(-1, keepdim=True),
    "cast": lambda h: (h.float().tanh() * h.float().sin()).to(h.dtype),
    "gelu": lambda h: F.gelu(h.tanh()),
    "gelu by tanh": lambda h: F.gelu(h.tanh(), approximate="tanh"),
    "Llama's norm": lambda h: frozen(LlamaRMSNorm(SIZE), h.dtype)(h.tanh()),
    "Gemma's norm": lambda h: frozen(GemmaRMSNorm(SIZE), h.dtype)(h.tanh()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", KNOWN.values(), ids=KNOWN)
def test_remade_is_the_same_to_the_bit(make, dtype):
    torch.manual_seed(0)
    x = make(torch.randn(3, 5, SIZE, requires_grad=True).to(dtype))
    assert recompute.can_remake(x)
    again = recompute.remade(x.grad_fn)
    made = formed(again).view(x.shape)
    assert made.dtype == x.dtype and made.stride() == x.stride()
    assert torch.equal(made, x)
    assert made.data_ptr() != x.data_ptr()
    assert recompute.remade(x.grad_fn) is again
    assert formed(again).data_ptr() == made.data_ptr()
    recompute.forget()
    assert recompute.remade(x.grad_fn) is not again
    recompute.forget()


#: What is made of factors of these kinds may be left to a kernel.
LEFT_TO_KERNELS = {
    "product": ("entries",),
    "square": ("entries",),
    "gated": ("entries",),
    "cast": ("entries",),  # to what it is already
    "broadcast": ("tokens",),
    "Llama's norm": ("tokens", "columns"),
    "Gemma's norm": ("tokens", "columns"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_products_need_not_be_formed(name):
    x = KNOWN[name](torch.randn(3, 5, SIZE, requires_grad=True))
    again = recompute.remade(x.grad_fn)
    recompute.forget()
    assert getattr(again, "kinds", None) == LEFT_TO_KERNELS.get(name)


def test_factors_of_other_shapes_are_multiplied_at_once():
    h = torch.randn(3, 5, SIZE, requires_grad=True)
    for factor in (h.mean(0), h.mean(1, keepdim=True), h.mean(0, keepdim=True), h.mean()):
        x = factor * h.exp()
        again = recompute.remade(x.grad_fn)
        recompute.forget()
        assert isinstance(again, torch.Tensor) and torch.equal(again, x)


def changed_in_place(h):
    x = h.tanh() * h.sin()
    with torch.no_grad():
        x.add_(1.0)
    return x


def under(hooks):
    def make(h):
        with hooks:
            return h.tanh() * h.sin()

    return make


UNKNOWN = {
    "a leaf": lambda h: h.detach().requires_grad_(),
    "no gradient": lambda h: h.detach() * 2,
    "other operation": torch.tanh,
    "product of a leaf that is not kept": lambda h: h.detach().requires_grad_() * 2,
    "sum": lambda h: h * h + h,
    "a part": lambda h: (h * h)[..., :4],
    "changed since": changed_in_place,
    "changed in place": lambda h: (h * h).mul_(h),
    "parameter": lambda h: nn.Parameter(h.detach()),
    "offloaded": under(torch.autograd.graph.save_on_cpu()),
    "checkpointed": lambda h: checkpoint(lambda h: h.tanh() * h.sin(), h, use_reentrant=False),
}


@pytest.mark.parametrize("make", UNKNOWN.values(), ids=UNKNOWN)
def test_what_must_be_kept(make):
    assert not recompute.can_remake(make(torch.randn(3, 5, SIZE, requires_grad=True).exp()))


def test_hooks_that_torch_does_not_tell_of_are_taken_for_granted():
    assert not recompute._is_free(object())


class Watched:
    """A model's gradients as they are, and as they are where every input is kept."""

    def __init__(self, model, monkeypatch):
        self.model, self.monkeypatch = model, monkeypatch
        self.nodes = []
        remade = recompute.remade

        def watched(node):
            self.nodes.append(node)
            return remade(node)

        monkeypatch.setattr(recompute, "remade", watched)

    def gradients(self, backward, is_kept=False):
        self.model.zero_grad()
        self.nodes.clear()
        with self.monkeypatch.context() as patch:
            if is_kept:
                patch.setattr(recompute, "can_remake", lambda x: False)
            backward(self.model)
        assert recompute._last is None
        found = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {name: gradient.clone() for name, gradient in found.items()}, len(self.nodes)


def plain(model):
    model(input_ids=IDS, labels=IDS).loss.backward()


def autocast(model):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain(model)


def twice(model):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    loss.backward()


def offloading(model):
    with torch.autograd.graph.save_on_cpu():
        plain(model)


def deltas_alone(model):
    deltas = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, deltas)
    for parameter, gradient in zip(deltas, gradients, strict=True):
        parameter.grad = gradient


def checkpointing(use_reentrant):
    def backward(model):
        kwargs = {"use_reentrant": use_reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        model.enable_input_require_grads()
        plain(model)

    return backward


#: Ways of going backward -> how many of the 14 inputs are made again: all but those of the first
#: layer's query, key and value, which no gradient goes through, and of the two outputs.
WAYS = {
    "plain": (plain, 9),
    "autocast": (autocast, 9),
    "twice": (twice, 18),
    "offloading": (offloading, 0),
    "deltas alone": (deltas_alone, 9),
    "reentrant checkpointing": (checkpointing(True), 12),
    "checkpointing": (checkpointing(False), 0),
}


@pytest.mark.parametrize(("backward", "num_remade"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["blocked", "compiled"])
def test_gradients_are_those_of_kept_inputs(
    llama, adapt, monkeypatch, backward, num_remade, dtype, backend
):
    model = adapt(llama(dtype), task_type="CAUSAL_LM").train()
    watched = Watched(model, monkeypatch)
    with ops.use_backend(backend):
        wanted, num = watched.gradients(backward, is_kept=True)
        assert num == 0 and len(wanted) == 14
        found, num = watched.gradients(backward)
    assert num == num_remade
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert torch.equal(found[name], gradient), name


def test_nothing_is_kept_beside_what_the_frozen_model_keeps(llama, adapt, monkeypatch):
    batch = {"input_ids": IDS, "labels": IDS}
    base = llama().requires_grad_(False)
    base.enable_input_require_grads()
    model = adapt(llama(), task_type="CAUSAL_LM")
    model.enable_input_require_grads()  # else the first layer would keep less than the base model's
    assert saved_for_backward_bytes(model, batch) == saved_for_backward_bytes(base, batch)
    monkeypatch.setattr(recompute, "can_remake", lambda x: False)
    # Two normalised inputs of 16 and one of 24 for each of 32 tokens, in both layers and fp32.
    kept = saved_for_backward_bytes(model, batch) - saved_for_backward_bytes(base, batch)
    assert kept == 2 * 4 * IDS.numel() * (16 + 16 + 24)


def test_the_next_forward_pass_lets_go_of_what_a_failed_backward_pass_kept(llama, adapt):
    model = adapt(llama(), task_type="CAUSAL_LM")

    def fail(*_):
        raise ValueError("no")

    layer = model.base_model.model.model.layers[0].mlp.gate_proj
    layer.spiel_deltas["default"].register_hook(fail)
    with pytest.raises(ValueError, match="no"):
        plain(model)
    assert recompute._last is not None
    layer.prepare()
    assert recompute._last is None
