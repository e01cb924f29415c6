"""The kernels that write into weights, against torch's own rounding, bit for bit.

On a GPU where there is one, else in Triton's interpreter, which tests/conftest.py chooses.
"""

import pytest
import torch

from spiel.live import LiveEntries
from spiel.support import random_support

pytest.importorskip("triton")
from spiel.ops import triton_kernels

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# The interpreter cuts bfloat16 off where hardware rounds to nearest even.
ROUNDED_DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")),
]


def weight_and_deltas(dtype, delta_dtype=torch.float32, layout="contiguous", k=900):
    torch.manual_seed(0)
    weight = (torch.randn(37, 50) * 3).to(DEVICE, dtype)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "sliced":
        weight = torch.cat([weight, weight], 1)[:, 25:75]
    deltas = torch.randn(k).to(DEVICE, delta_dtype) * 10.0 ** torch.randint(-6, 1, (k,)).to(DEVICE)
    return weight, random_support(k, weight.numel(), DEVICE), deltas.to(delta_dtype)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
@pytest.mark.parametrize("delta_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [*ROUNDED_DTYPES, torch.float64])
def test_entries_are_written_as_live_weights_write_them(dtype, delta_dtype, layout):
    weight, indices, deltas = weight_and_deltas(dtype, delta_dtype, layout)
    originals = weight.take(indices.long())
    num_stored = weight.untyped_storage().nbytes() // weight.itemsize
    storage = torch.as_strided(weight, (num_stored,), (1,), 0)
    expected = storage.clone()
    like_weight = torch.as_strided(expected, weight.shape, weight.stride(), weight.storage_offset())
    LiveEntries(like_weight, {"a": indices}).write({"a": deltas})
    for _ in range(2):  # never accumulated into
        triton_kernels.write_entries(weight, indices, originals, deltas)
    assert torch.equal(storage, expected)


@pytest.mark.filterwarnings("ignore:overflow")  # meant, and NumPy says so in the interpreter
@pytest.mark.parametrize("dtype", ROUNDED_DTYPES)
def test_rounding_is_torchs_bit_for_bit_at_ties_and_extremes(dtype):
    steps = torch.arange(-512, 512) / 512  # of a unit in the last place: ties are among them
    eps = torch.finfo(dtype).eps
    originals = torch.tensor([1.0, -1.0, 1.0 + eps, 3.0, 0.0, 1e-7, torch.finfo(dtype).max])
    originals = originals.to(DEVICE, dtype).repeat_interleave(len(steps))
    deltas = (steps * eps).to(DEVICE).repeat(7) * originals.float().abs().clamp_min(1.0)
    weight = torch.zeros(7, len(steps), dtype=dtype, device=DEVICE)
    indices = torch.arange(weight.numel(), device=DEVICE)
    triton_kernels.write_entries(weight, indices, originals, deltas)
    assert torch.equal(weight.view(-1), (originals.float() + deltas).to(dtype))


def test_sums_of_float64_go_to_16_bits_by_way_of_32_as_in_torch():
    originals = torch.ones(1, dtype=torch.float16, device=DEVICE)
    deltas = torch.full((1,), 2**-11 + 2**-40, dtype=torch.float64, device=DEVICE)
    weight = torch.zeros(1, 1, dtype=torch.float16, device=DEVICE)
    triton_kernels.write_entries(weight, torch.tensor([0], device=DEVICE), originals, deltas)
    assert torch.equal(weight.view(-1), (originals + deltas).to(torch.float16))


@pytest.mark.skipif(HAS_GPU, reason="hardware rounds, see above")
def test_the_interpreter_writes_bfloat16_to_within_one_unit_in_the_last_place():
    weight, indices, deltas = weight_and_deltas(torch.bfloat16)
    originals = weight.take(indices.long())
    triton_kernels.write_entries(weight, indices, originals, deltas)
    sums = originals.float() + deltas
    assert ((weight.take(indices.long()).float() - sums).abs() <= sums.abs() * 2**-7).all()


def test_writing_all_entries_or_none():
    weight, indices, deltas = weight_and_deltas(torch.float32, k=37 * 50)
    before = weight.clone()
    triton_kernels.write_entries(weight, indices[:0], deltas[:0], deltas[:0])
    assert torch.equal(weight, before)
    triton_kernels.write_entries(weight, indices, before.view(-1), deltas)
    assert torch.equal(weight, before + deltas.view_as(weight))


def test_a_parameter_is_written_without_a_trace_in_its_graph():
    weight, indices, deltas = weight_and_deltas(torch.float32)
    parameter = torch.nn.Parameter(weight)
    out = parameter.square().sum()
    triton_kernels.write_entries(parameter, indices, deltas, deltas.requires_grad_())
    out.backward()  # would refuse if the weight counted as changed
    assert parameter.is_leaf
