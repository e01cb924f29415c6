"""Every backend against the dense definition, at awkward shapes."""

import subprocess
import sys

import pytest
import torch

from spiel import ops
from spiel.live import LiveEntries
from spiel.ops import blocked, optional, reference
from spiel.ops.blocked import _highest, sampled_gradients
from spiel.ops.product import Product, flat, formed
from spiel.ops.transposed import forget_operands, last_left, last_right
from spiel.ranking import largest
from spiel.support import random_support

#: Those that run wherever torch does; the kernels have tests of their own in test_triton.py.
BACKENDS = sorted(ops.BACKENDS.keys() - {"triton"})

SHAPES = [(1, 1, 1), (63, 17, 31), (1000, 5, 7), (3, 130, 65)]


def operands(tokens, rows, cols, dtype=torch.float32):
    torch.manual_seed(tokens)
    return torch.randn(tokens, rows, dtype=dtype), torch.randn(tokens, cols, dtype=dtype)


def assert_close_rms(actual, expected, ratio):
    error = (actual.double() - expected.double()).square().mean().sqrt()
    assert error <= ratio * expected.double().square().mean().sqrt().clamp_min(1e-30)


@pytest.fixture
def small_blocks(monkeypatch):
    """A workspace of a few rows, so that small matrices span several blocks."""
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", 2000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_sampled_gradient_is_the_dense_one_at_the_indices(backend, shape, share, index_dtype):
    _, rows, cols = shape
    left, right = operands(*shape)
    indices = random_support(int(rows * cols * share), rows * cols).to(index_dtype)
    ops.backend_calls.clear()
    with ops.use_backend(backend):
        values = ops.sampled_gradient(left, right, indices)
    expected = (left.double().t() @ right.double()).view(-1)[indices.long()]
    assert values.dtype == torch.float32
    assert values.shape == indices.shape
    if len(indices) > 0:
        assert_close_rms(values, expected, 1e-5)
        assert ops.backend_calls == {backend: 1}


#: Factors of an operand [tokens, n], the first one of which is [2, tokens / 2, n].
FACTORS = {
    "entries": lambda x: [x, x.cos()],
    "tokens": lambda x: [x, x[..., :1].cos()],
    "columns": lambda x: [x, x[0, 0].cos()],
    "normalised": lambda x: [x, x[..., :1].cos(), x[0, 0]],
    "normalised and gated": lambda x: [x, x[..., :1].cos(), x[0, 0], x.cos()],
    "not contiguous": lambda x: [x.transpose(0, 1).contiguous().transpose(0, 1), x.cos()],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(64, 17, 31), (1000, 5, 7), (2, 130, 65), (96, 32, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FACTORS)
def test_a_product_is_formed_on_the_way_to_the_same_bits(backend, shape, dtype, name):
    tokens, rows, cols = shape
    left, right = operands(*shape, dtype)
    product = Product.of(FACTORS[name](right.view(2, tokens // 2, cols)))
    assert product.shape == (tokens, cols) and flat(product) is product
    expected = torch.ones((), dtype=dtype)
    for factor in (product.one, *product.others):
        expected = expected * factor
    indices = random_support(rows * cols // 3, rows * cols)
    with ops.use_backend(backend):
        values = ops.sampled_gradient(left, product, indices)
        assert torch.equal(values, ops.sampled_gradient(left, expected, indices))
    by_kernel = backend == "compiled" and dtype == torch.float32
    assert bool(product.others) == (
        by_kernel and name in ("entries", "normalised", "not contiguous")
    )
    assert torch.equal(formed(product), expected)
    assert formed(product) is formed(product)


def test_numbers_are_no_operand():
    assert Product.of([torch.tensor(2.0), torch.tensor(3.0)]) is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_operands_and_crowded_or_empty_rows(backend):
    left, right = operands(50, 12, 20)
    left, right = left.t().contiguous().t(), torch.cat([right, right], 1)[:, ::2]
    indices = torch.cat([torch.arange(40, 60), torch.tensor([239])]).int()  # row 2 and the last
    expected = reference.sampled_gradients(left, right, [indices])[0]
    with ops.use_backend(backend):
        assert_close_rms(ops.sampled_gradient(left, right, indices), expected, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_autocast_around_it_changes_nothing(backend):
    left, right = operands(50, 12, 20)
    indices = random_support(100, 240)

    def found():
        largest = getattr(sys.modules[f"spiel.ops.{backend}"], "largest_gradients", None)
        values = ops.sampled_gradient(left, right, indices)
        return [values] if largest is None else [values, *largest(left, right, 30)]

    with ops.use_backend(backend):
        expected = found()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = found()
    assert all(torch.equal(*each) for each in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_operands_are_accumulated_in_fp32(backend, dtype):
    left, right = operands(777, 30, 40, dtype)
    indices = random_support(100, 1200)
    expected = (left.double().t() @ right.double()).view(-1)[indices.long()]
    with ops.use_backend(backend):
        assert_close_rms(ops.sampled_gradient(left, right, indices), expected, 1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_largest_gradients(shape, share):
    left, right = operands(*shape)
    k = max(1, int(shape[1] * shape[2] * share))
    indices, values = blocked.largest_gradients(left, right, k)
    expected_indices, expected_values = reference.largest_gradients(left, right, k)
    assert indices.dtype == torch.int32
    assert torch.equal(indices.long(), expected_indices)
    assert_close_rms(values, expected_values, 1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("order", ["rising", "falling", "equal"])
@pytest.mark.parametrize("k", [3, 20, 60, 300])
def test_largest_gradients_in_whatever_block_they_are(order, k):
    rows, cols = 60, 10
    assert len(list(blocked.row_blocks(rows, cols))) > 4
    by_row = {"rising": torch.arange(1.0, 61), "falling": torch.arange(60.0, 0, -1)}
    left, right = by_row.get(order, torch.ones(rows))[None], torch.ones(1, cols)
    indices, values = blocked.largest_gradients(left, right, k)
    dense = (left.t() @ right).view(-1)
    expected = dense.argsort(descending=True, stable=True)[:k].sort().values
    assert indices.tolist() == expected.tolist()
    assert torch.equal(values, dense[expected])


@pytest.mark.usefixtures("small_blocks")
def test_largest_gradients_of_reduced_blocks_and_entries_as_they_were():
    left, right = operands(40, 33, 21)
    seen = []

    def reduce(block):
        seen.append(block.shape[0])
        block.mul_(torch.arange(21))  # a column of zeros first, as another rank might bring

    support = random_support(50, 33 * 21)
    entries = blocked.BlockEntries([support], 33, 21)
    indices, _ = blocked.largest_gradients(left, right, 30, reduce, entries)
    dense = left.t() @ right
    assert_close_rms(entries.values[0], dense.view(-1)[support.long()], 1e-5)
    dense = dense.mul(torch.arange(21)).view(-1).abs()
    assert sorted(indices.tolist()) == sorted(dense.topk(30).indices.tolist())
    assert sum(seen) == 33
    assert len(seen) > 1


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("row", [0, 32])
def test_a_value_that_is_not_finite_is_among_the_largest_wherever_it_stands(row):
    left, right = operands(40, 33, 21)
    left[3, row] = float("nan")
    _, values = blocked.largest_gradients(left, right, 30)
    assert int(values.isnan().sum()) == 21


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("k", [1, 50, 600])
def test_largest_products_leave_out_the_excluded(k):
    torch.manual_seed(k)
    row, col, exclude = torch.rand(40), torch.rand(30), random_support(300, 1200)
    found = blocked.largest_products(row, col, k, exclude)
    assert torch.equal(found, reference.largest_products(row, col, k, exclude))


@pytest.mark.parametrize("scale", [1e-44, 1e-24, 1e24, 1e38])
def test_largest_products_neither_vanish_nor_overflow(scale):
    generator = torch.Generator().manual_seed(0)
    row, col = (1 + torch.rand(n, generator=generator) for n in (12, 9))
    none = torch.zeros(0, dtype=torch.int32)
    if scale < 1e-38:  # few digits are left so near to 0
        row, col = (64 * torch.arange(1, n + 1.0) for n in (12, 9))
    tiny = blocked.largest_products(row * scale, col * scale, 8, none)
    assert torch.equal(tiny, blocked.largest_products(row, col, 8, none))


def test_largest_products_grow_what_there_is_when_scores_are_zero():
    row, col = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    found = blocked.largest_products(row, col, 6, exclude=torch.tensor([0, 5]))
    assert found.tolist() == [1, 2, 3, 4]


def test_no_block_is_larger_than_the_workspace():
    for rows, cols in [(11008, 4096), (4096, 11008), (128256, 4096), (7, 3)]:
        blocks = list(blocked.row_blocks(rows, cols))
        assert blocks[0][0] == 0
        assert blocks[-1][1] == rows
        tallest = max(stop - start for start, stop in blocks)
        assert tallest * cols * 17 <= blocked.WORKSPACE_BYTES
        assert all(start % 128 == 0 for start, _ in blocks)  # addresses of whole 16 bytes


def test_an_unknown_backend_is_refused():
    with (
        pytest.raises(
            ValueError, match="'cuda', must be one of blocked, compiled, reference, sampled, triton"
        ),
        ops.use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize(("has_numba", "sparse"), [(True, "compiled"), (False, "sampled")])
def test_the_rule_takes_single_entries_where_they_are_faster(has_numba, sparse, monkeypatch):
    monkeypatch.setattr(optional, "has_numba", lambda: has_numba)
    cpu = torch.device("cpu")
    assert ops.choose_backend(cpu, 1000, 512 * 512) == sparse
    assert ops.choose_backend(cpu, 512 * 160, 512 * 512) == "blocked"
    assert ops.choose_backend(cpu, 10, 32 * 32) == "blocked"


def test_a_gradient_asked_for_again_heeds_what_is_asked_now():
    left, right, indices = *operands(300, 40, 33), random_support(500, 40 * 33)
    gradient = ops.SupportGradients(indices)
    threads = torch.get_num_threads()
    try:
        for backend in (None, *BACKENDS, None):
            for dtype in (torch.float32, torch.bfloat16):
                for num_threads in (1, 2):
                    torch.set_num_threads(num_threads)
                    own = left.to(dtype), right.to(dtype)
                    indices.copy_(random_support(500, 40 * 33))
                    ops.backend_calls.clear()
                    with ops.use_backend(backend):
                        (found,) = gradient(*own)
                        assert ops.backend_calls == {backend or "blocked": 1}
                        assert torch.equal(found, ops.sampled_gradient(*own, indices))
    finally:
        torch.set_num_threads(threads)
    (none,) = ops.SupportGradients(indices[:0])(left, right)
    assert none.shape == (0,) and none.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_threads_leave_a_gradient_of_its_own_size(backend):
    left, right, indices = *operands(300, 40, 33), random_support(500, 40 * 33)
    expected = reference.sampled_gradients(left, right, [indices])[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ops.use_backend(backend):
            values = ops.sampled_gradient(left, right, indices)
    finally:
        torch.set_num_threads(threads)
    assert_close_rms(values, expected, 1e-5)
    assert values.untyped_storage().nbytes() == 4 * 500


@pytest.mark.parametrize("num_threads", [1, 2, 6, 7, 64])
@pytest.mark.parametrize("most_sums", [1, 2, 3, 100])
def test_threads_share_rows_where_sums_of_their_own_would_be_too_many(
    num_threads, most_sums, monkeypatch
):
    compiled = pytest.importorskip("spiel.ops.compiled")
    left, right = operands(300, 40, 33)
    supports = [random_support(500, 40 * 33), torch.arange(33 * 7, 33 * 7 + 100)]
    monkeypatch.setattr(compiled, "set_threads", lambda: num_threads)
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", most_sums * 4 * 600)
    shares = compiled._num_shares(num_threads, 600)
    assert shares <= most_sums and num_threads % shares == 0
    assert shares == num_threads or num_threads > most_sums
    found = compiled.sampled_gradients(left, right, supports)
    for own, expected in zip(
        found, reference.sampled_gradients(left, right, supports), strict=True
    ):
        assert_close_rms(own, expected, 1e-5)


def test_the_first_product_leaves_torchs_number_of_threads_alone():
    code = """if True:
        import torch
        from spiel import ops
        torch.set_num_threads(1)
        with ops.use_backend("compiled"):
            ops.sampled_gradient(torch.ones(8, 4), torch.ones(8, 4), torch.arange(4))
        print(torch.get_num_threads())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_operands_that_change_or_move_are_transposed_anew():
    left, right = operands(20, 6, 9)
    indices = random_support(20, 54)
    with ops.use_backend("sampled"):
        for changed in (right, right.mul_(2), right[:, torch.randperm(9)], right[1:][:, :9]):
            values = ops.sampled_gradient(left[: len(changed)], changed, indices)
            expected = reference.sampled_gradients(left[: len(changed)], changed, [indices])[0]
            assert_close_rms(values, expected, 1e-5)
    ops.forget()


def test_a_numba_that_does_not_work_is_done_without_and_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "spiel.ops.compiled", None)  # importing it fails
    optional.has_numba.cache_clear()
    with pytest.warns(UserWarning, match="numba cannot be used"):
        assert not optional.has_numba()
    assert ops.choose_backend(torch.device("cpu"), 1000, 512 * 512) == "sampled"
    optional.has_numba.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_contiguous", [True, False])
@pytest.mark.parametrize("has_numba", [True, False])
def test_entries_are_written_to_the_same_bits_by_a_kernel_or_without(
    dtype, is_contiguous, has_numba, monkeypatch
):
    monkeypatch.setattr(optional, "has_numba", lambda: has_numba)
    monkeypatch.setattr(optional, "CPU_MIN_NUMEL", 600)
    torch.manual_seed(0)
    weight = torch.randn(30, 20, dtype=dtype)
    weight = weight if is_contiguous else weight.t()
    indices, deltas = random_support(50, 600), torch.randn(50)
    expected = weight.clone().reshape(-1)
    expected[indices.long()] = (expected[indices.long()].float() + deltas).to(dtype)
    LiveEntries(weight, {"own": indices}).write({"own": deltas})
    assert torch.equal(weight.reshape(-1), expected)
    small = torch.zeros(2, 3)
    assert not ops.write_entries(small, torch.tensor([1]), torch.ones(1), torch.ones(1))
    by_kernel = ops.write_entries(weight, indices, deltas, deltas)
    assert by_kernel == (has_numba and is_contiguous and dtype == torch.float32)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_double_operands(backend):
    left, right = operands(63, 17, 31, torch.float64)
    indices = random_support(50, 17 * 31)
    with ops.use_backend(backend):
        values = ops.sampled_gradient(left, right, indices)
    assert values.dtype == torch.float32
    assert_close_rms(values, (left.T @ right).reshape(-1)[indices.long()], 1e-6)
    indices, values = blocked.largest_gradients(left, right, 20)
    assert torch.equal(values, (left.T @ right).float().reshape(-1)[indices.long()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_fp32_whatever_the_default(backend):
    left, right = operands(8, 5, 7)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with ops.use_backend(backend):
            supports = [random_support(9, 35), random_support(0, 35)]
            found = ops.SupportGradients(*supports)(left, right)
            found += ops.SupportGradients(*supports[1:])(left, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {values.dtype for values in found} == {torch.float32}


def test_settling_leaves_nothing_to_be_compiled_for_the_first_steps():
    code = """if True:
        import torch
        import spiel
        from spiel import ops
        from spiel.reselection import exchange, grow_by_gradients
        from spiel.support import random_support
        numel, k = 512 * 512, 2500
        ops.settle(torch.device("cpu"), torch.float32, [(k, numel), (10, 100)])
        from spiel.ops import blocked, compiled, scans
        kernels = [compiled._products, scans._write_sums, scans._adamw, scans._above]
        kernels += [scans._find, scans._exchange, scans._raise_sm3]
        before = [len(kernel.signatures) for kernel in kernels]
        indices, values = random_support(k, numel), torch.rand(k)
        assert ops.write_entries(torch.zeros(512, 512), indices, values, values)
        left, right = torch.randn(8, 512), torch.randn(8, 512)
        deltas = torch.nn.Parameter(values.clone())
        deltas.grad = ops.sampled_gradient(left, right, indices)
        spiel.SpielAdamW([deltas]).step()
        scans.raise_sm3(indices, values, torch.zeros(512), torch.zeros(512))
        candidates, sums = blocked.largest_gradients(left, right, k)
        slots, entering = grow_by_gradients(candidates, sums, indices, values, k // 2)
        exchange(indices, slots, candidates[entering])
        print(before, [len(kernel.signatures) for kernel in kernels], dict(ops.backend_calls))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[1] * 7} {[1] * 7} {{'compiled': 1}}"


@pytest.mark.parametrize("already", ["", "import spiel.ops.compiled"])
def test_small_models_are_spared_the_compiler(already):
    """Also where numba was imported, as in the arena: what it needs to run code takes as much."""
    code = """if True:
        import sys, torch
        import spiel
        from spiel import ops
        from spiel.ops import blocked
        from spiel.reselection import exchange, grow_by_gradients
        from spiel.support import random_support
        numel, k = 200 * 200, 5000
        ops.settle(torch.device("cpu"), torch.float32, [(k, numel)])
        indices, deltas = random_support(k, numel), torch.nn.Parameter(torch.rand(k))
        left, right = torch.randn(8, 200), torch.randn(8, 200)
        deltas.grad = ops.sampled_gradient(left, right, indices)
        spiel.SpielAdamW([deltas]).step()
        candidates, sums = blocked.largest_gradients(left, right, k)
        slots, entering = grow_by_gradients(candidates, sums, indices, deltas, k // 2)
        exchange(indices, slots, candidates[entering])
        print("numba" in sys.modules, "spiel.ops.scans" in sys.modules)
    """
    code = f"{already}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{bool(already)} False"


def test_the_block_of_products_is_let_go_of():
    left, right = operands(8, 40, 33)
    blocked.largest_gradients(left, right, 5)
    assert len(blocked._kept.block) >= 40 * 33
    ops.forget()
    assert blocked._kept.block is None


def test_operands_of_both_sides_are_let_go():
    for last in (last_left, last_right):
        last(torch.ones(3, 2), torch.float32)
    forget_operands()
    assert last_left._kept is None
    assert last_right._kept is None


def test_a_copy_made_in_another_way_is_no_copy_of_this_one():
    operand = torch.arange(6.0).view(3, 2)
    one = last_left(operand, torch.float32)
    other = last_left(operand, torch.float32, lambda x, dtype: torch.zeros(2, 16, dtype=dtype))
    forget_operands()
    assert (one.shape, other.shape) == ((2, 3), (2, 16))


def test_entries_are_written_from_tensors_that_are_not_contiguous():
    from spiel.ops import triton_kernels

    weight, expected = torch.zeros(4, 5), torch.zeros(20)
    indices, originals, deltas = (
        torch.stack([own, torch.zeros_like(own)], dim=1)[:, 0]
        for own in (torch.tensor([1, 7, 19], dtype=torch.int32), torch.rand(3), torch.rand(3))
    )
    assert not indices.is_contiguous()
    expected[indices.long()] = originals + deltas
    triton_kernels.write_entries(weight, indices, originals, deltas)
    assert torch.equal(weight.flatten(), expected)


def test_another_view_of_the_same_memory_is_copied_anew():
    square = torch.arange(9.0).view(3, 3)
    for view in (square, square.t(), square[:2]):
        assert torch.equal(last_left(view, torch.float32), view.t())
    forget_operands()


@pytest.mark.parametrize("other", ["indices", "bounds"])
def test_where_a_support_is_cut_follows_what_is_written_into_it(monkeypatch, other):
    left, right = torch.randn(5, 64), torch.randn(5, 8)
    indices = torch.tensor([1, 130, 300], dtype=torch.int32)
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", 16 * 8 * blocked._BYTES_PER_ENTRY)
    sampled_gradients(left, right, [indices])
    if other == "indices":
        indices.copy_(torch.tensor([400, 401, 500]))
    else:
        monkeypatch.setattr(blocked, "WORKSPACE_BYTES", 24 * 8 * blocked._BYTES_PER_ENTRY)
    (found,) = sampled_gradients(left, right, [indices])
    torch.testing.assert_close(found, (left.T @ right).flatten()[indices.long()])


def test_a_sample_that_lets_too_few_through_is_done_without():
    entries = torch.zeros(2**16)
    entries[:: blocked.SAMPLE_STRIDE] = 1.0
    where, found = _highest(entries, torch.abs, largest, 2**13)
    assert (len(where), len(found), int(found.sum())) == (2**13, 2**13, int(entries.sum()))
