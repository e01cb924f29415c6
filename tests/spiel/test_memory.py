"""Neither training steps nor reselection make a tensor as large as a weight."""

import peft
import pytest
import torch
from torch import nn
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import spiel
from spiel import live, ops
from spiel.ops import blocked

ROWS, COLS, WORKSPACE_BYTES = 1200, 1000, 2**19


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, views of older ones left out."""

    def __init__(self):
        super().__init__()
        self.num_bytes, self.operation = 0, None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            if tensor.untyped_storage().data_ptr() not in before and tensor.nbytes > self.num_bytes:
                self.num_bytes, self.operation = tensor.nbytes, str(func)
        return out


def tensors(tree):
    leaves = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.layout is torch.strided]


@pytest.mark.parametrize("growth", ["ag", "ma"])
@pytest.mark.parametrize("backend", ["sampled", "blocked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_the_workspace(growth, backend, dtype, monkeypatch):
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", WORKSPACE_BYTES)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(COLS, ROWS)).to(dtype)
    config = spiel.SpielConfig(
        growth=growth,
        num_tunable_weights=2000,
        target_modules=["0"],
        reselection_steps=4,
        selection_accumulation_steps=2,
    )
    model = peft.get_peft_model(base, config)
    optimizer = {"ag": spiel.SpielAdamW, "ma": spiel.SpielSM3}[growth](model, lr=0.01)
    x = torch.randn(8, COLS, dtype=dtype, requires_grad=True)
    before = spiel.get_deltas(model)["0"][0]
    with ops.use_backend(backend), Largest() as largest:
        reselector = spiel.Reselector(model, optimizer, total_steps=8)
        for _ in range(8):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            reselector.step()
    assert not torch.equal(before, spiel.get_deltas(model)["0"][0])  # it did reselect
    # Activations, and the constant table of bias corrections, are smaller still.
    assert largest.num_bytes <= WORKSPACE_BYTES, largest.operation
    assert base[0].base_layer.weight.nbytes > 4 * WORKSPACE_BYTES


def test_no_copy_of_a_16_bit_weight_is_made_to_write_its_entries():
    weight = torch.randn(4000, 4000, dtype=torch.bfloat16)
    places, entries = torch.arange(0, weight.numel(), 1000), torch.ones(16000, dtype=weight.dtype)
    with profile(profile_memory=True) as profiled:
        live._write(weight, places, entries)
    assert max(event.self_cpu_memory_usage for event in profiled.key_averages()) < weight.nbytes
    assert torch.equal(weight.view(-1)[places], entries)


def test_the_workspace_is_small():
    """As it is, where the tests above had it smaller; and numba's memory, which they do not see."""
    assert blocked.WORKSPACE_BYTES <= 64 * 2**20
    compiled = pytest.importorskip("spiel.ops.compiled")
    compiled._kept.values = compiled._kept.values[:0]
    tokens, threads = 4000, torch.get_num_threads()
    left, right = torch.randn(tokens, ROWS), torch.randn(tokens, COLS)
    with ops.use_backend("compiled"):
        ops.sampled_gradient(left, right, torch.arange(0, ROWS * COLS, 500))
    assert compiled._kept.values.nbytes <= 1.01 * threads * (ROWS + COLS) * compiled.SLAB * 4


def test_the_reference_would_be_caught():
    left, right = torch.randn(8, ROWS), torch.randn(8, COLS)
    with Largest() as largest:
        ops.reference.sampled_gradients(left, right, [torch.arange(3)])[0]
    assert largest.num_bytes == ROWS * COLS * 4
