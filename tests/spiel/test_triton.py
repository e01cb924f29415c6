"""The sampled kernel against the dense definition, and where kernels run.

On a GPU where there is one, else in Triton's interpreter, which tests/conftest.py chooses.
"""

import ast
import sys
from pathlib import Path

import pytest
import torch

import spiel
from spiel import ops
from spiel.ops import optional, reference
from spiel.support import random_support

pytest.importorskip("triton")
from spiel.ops import triton_kernels

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Tokens, rows, columns.
SHAPES = [(1, 1, 1), (63, 17, 31), (1000, 5, 7), (3, 130, 65), (64, 1, 300), (257, 40, 1)]


def operands(tokens, rows, cols, left_dtype=torch.float32, right_dtype=None):
    torch.manual_seed(tokens)
    left = torch.randn(tokens, rows).to(DEVICE, left_dtype)
    return left, torch.randn(tokens, cols).to(DEVICE, right_dtype or left_dtype)


def on_triton(left, right, indices):
    ops.backend_calls.clear()
    with ops.use_backend("triton"):
        values = ops.sampled_gradient(left, right, indices)
    assert ops.backend_calls == ({"triton": 1} if len(indices) else {})
    assert values.dtype == torch.float32
    assert values.device == left.device
    return values


def assert_is_the_dense_one(left, right, indices):
    values = on_triton(left, right, indices)
    expected = (left.double().t() @ right.double()).view(-1)[indices.long()]
    assert values.shape == expected.shape
    error = (values - expected).square().mean().sqrt()
    assert error <= 1e-5 * expected.square().mean().sqrt().clamp_min(1e-30)
    return values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_values_are_the_dense_ones_at_the_indices(shape, share, index_dtype):
    numel = shape[1] * shape[2]
    indices = random_support(max(1, int(numel * share)), numel).to(DEVICE, index_dtype)
    assert_is_the_dense_one(*operands(*shape), indices)


@pytest.mark.parametrize("left_dtype", DTYPES)
@pytest.mark.parametrize("right_dtype", DTYPES)
def test_products_of_any_dtypes_are_summed_in_fp32(left_dtype, right_dtype):
    left, right = operands(777, 30, 40, left_dtype, right_dtype)
    assert_is_the_dense_one(left, right, random_support(100, 1200, DEVICE))


def test_agrees_with_the_reference():
    left, right = operands(100, 24, 36)
    indices = random_support(200, 24 * 36, DEVICE)
    expected = reference.sampled_gradients(left, right, [indices])[0]
    torch.testing.assert_close(on_triton(left, right, indices), expected, rtol=1e-4, atol=1e-4)


def test_crowded_and_empty_rows():
    left, right = operands(50, 12, 300)
    row = torch.arange(600, 900)  # all of row 2, and the last entry of all
    assert_is_the_dense_one(left, right, torch.cat([row, torch.tensor([3599])]).int().to(DEVICE))


def test_non_contiguous_operands_and_indices():
    left, right = operands(50, 12, 40)
    indices = random_support(200, 12 * 20, DEVICE)
    spaced = torch.stack([indices, indices], 1)[:, 0]
    left = left.t().contiguous().t()
    for view in (right[:, ::2], right[:, 20:], right[:, :20].t().contiguous().t()):
        assert_is_the_dense_one(left, view, spaced)
    assert_is_the_dense_one(left[::2], right[1::2, :20], indices)
    broadcast = right[:1, :20].expand(50, 20)  # a stride of 0
    assert_is_the_dense_one(left, broadcast, indices)


def test_nothing_wanted_or_no_tokens():
    left, right = operands(8, 4, 5)
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    assert on_triton(left, right, none).shape == (0,)
    assert triton_kernels.sampled_gradients(left, right, [none])[0].shape == (0,)
    some = torch.tensor([0, 7], device=DEVICE)
    assert on_triton(left[:0], right[:0], some).tolist() == [0.0, 0.0]


def test_the_same_bits_every_time():
    left, right = operands(500, 20, 30, torch.bfloat16)
    indices = random_support(300, 600, DEVICE)
    first = on_triton(left, right, indices)
    ops.forget()
    assert torch.equal(on_triton(left, right, indices), first)


def test_operands_that_change_or_move_are_copied_anew_and_others_are_not(monkeypatch):
    copied = []
    copy = triton_kernels.padded_transpose

    def counted(*args):
        copied.append(args)
        return copy(*args)

    monkeypatch.setattr(triton_kernels, "padded_transpose", counted)
    left, right = operands(20, 6, 9)
    indices = random_support(20, 54, DEVICE)
    for num_copies, scale in [(2, 1.0), (3, 2.0), (3, 1.0)]:
        if scale != 1.0:
            right.mul_(scale)
        assert_is_the_dense_one(left, right, indices)
        assert len(copied) == num_copies
    assert_is_the_dense_one(left, right[:, torch.randperm(9)], indices)
    assert len(copied) == 4
    for _ in range(2):
        assert_is_the_dense_one(left[1:], right[1:], indices)
        assert len(copied) == 6


def test_copies_keep_the_dtype_and_end_in_zeros():
    _, right = operands(63, 1, 70, torch.bfloat16)
    copy = triton_kernels.padded_transpose(right, torch.bfloat16)
    assert copy.dtype == torch.bfloat16
    assert copy.shape == (70, 64)
    assert torch.equal(copy[:, :63], right.t())
    assert not copy[:, 63:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_trains_on_it_as_on_the_blocked_product(two_layers, adapt, dtype):
    x = torch.randn(5, 7, 12).to(DEVICE, dtype)
    found = []
    for backend in ("blocked", "triton"):
        model = adapt(two_layers(dtype=dtype).to(DEVICE), target_modules=["first", "second"])
        ops.backend_calls.clear()
        with ops.use_backend(backend):
            model(x).square().sum().backward()
        assert ops.backend_calls == {backend: 2}
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == 2
    for blocked_gradient, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, blocked_gradient, rtol=1e-4, atol=1e-4)


# -- where it runs ---------------------------------------------------------------------------


def test_without_triton_the_message_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "spiel.ops.triton_kernels")
    monkeypatch.delattr(ops, "triton_kernels")
    monkeypatch.setattr(optional, "module", optional.module.__wrapped__)  # imports each time
    left, right = operands(4, 3, 3)
    with ops.use_backend("triton"), pytest.raises(ImportError, match="needs triton"):
        ops.sampled_gradient(left, right, torch.tensor([1], device=DEVICE))


def test_only_the_kernels_import_triton_before_it_is_used():
    for path in Path(spiel.__file__).parent.rglob("*.py"):
        body = ast.parse(path.read_text()).body
        at_once = [n for n in body if not isinstance(n, ast.FunctionDef | ast.ClassDef)]
        imports = any("import triton\n" in f"{ast.unparse(node)}\n" for node in at_once)
        assert imports == path.name.startswith("triton_"), path


def test_tensors_that_kernels_cannot_reach_are_refused(monkeypatch):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    left, right = (operand.cpu() for operand in operands(4, 3, 3))
    weight = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="takes tensors on one CUDA device, got some on cpu"):
        triton_kernels.sampled_gradients(left, right, [torch.tensor([1])])[0]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        triton_kernels.write_entries(weight, torch.tensor([1]), torch.ones(1), torch.ones(1))


def test_tensors_on_several_devices_are_refused():
    left, right = operands(4, 3, 3)
    with pytest.raises(RuntimeError, match=r"on one CUDA device, got some on .*, meta"):
        triton_kernels.sampled_gradients(left, right, [torch.tensor([1], device="meta")])[0]


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_the_rule_on_a_gpu_names_what_it_runs():
    left, right = operands(512, 1024, 1024, torch.bfloat16)
    for k in (100, 500_000):
        indices = random_support(k, 1024 * 1024, DEVICE)
        ops.backend_calls.clear()
        ops.sampled_gradient(left, right, indices)
        chosen = ops.choose_backend(left.device, k, 1024 * 1024, torch.bfloat16)
        assert ops.backend_calls == {chosen: 1}
    assert chosen == "blocked"


@pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
def test_fixed_blocks_give_the_same_values_as_tuned_ones():
    left, right = operands(2048, 256, 256, torch.bfloat16)
    indices = random_support(2000, 256 * 256, DEVICE)
    tuned = on_triton(left, right, indices)
    torch.use_deterministic_algorithms(True)
    try:
        fixed = on_triton(left, right, indices)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(fixed, tuned, rtol=1e-4, atol=1e-3)
