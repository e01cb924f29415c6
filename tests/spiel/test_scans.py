"""numba's walks along arrays: each to the same bits as what torch's operations say."""

from unittest.mock import Mock, patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spiel
from spiel import reselection, support
from spiel.ops import blocked, optional
from spiel.support import random_support

scans = pytest.importorskip("spiel.ops.scans")

#: Of fp32 values: their signs, zeros, and what is not finite.
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, 1e-42, float("inf"), -float("inf"), float("nan")]


@pytest.fixture
def with_and_without(monkeypatch):
    """Goes through a loop twice: with numba, and as if there were none."""

    def turns():
        for has_numba in (True, False):
            monkeypatch.setattr(optional, "has_numba", lambda has_numba=has_numba: has_numba)
            yield has_numba

    return turns


@pytest.fixture
def counted(monkeypatch):
    """Has calls of one of numba's walks, named, counted by the Mock that it gives."""

    def wrapped(name):
        walk = Mock(wraps=getattr(scans, name))
        monkeypatch.setattr(scans, name, walk)
        return walk

    return wrapped


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(VALUES), min_size=1, max_size=100),
    st.sampled_from([0.0, 1e-42, 1.0, 2.0, float("inf"), float("nan")]),
    st.sampled_from([1, 2, 3, 7, 64]),
)
def test_above_takes_what_is_larger_in_magnitude_or_no_number(values, bound, num_threads):
    values = torch.tensor(values)
    with patch.object(scans, "set_threads", lambda: num_threads):
        places, found = scans.above(values, bound)
    expected = (values.abs() <= bound).logical_not().nonzero().squeeze(1)
    assert torch.equal(places, expected)
    torch.testing.assert_close(found, values[expected], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("height", [1, 3, 100])
def test_the_largest_gradients_are_the_same_with_and_without(
    dtype, height, with_and_without, monkeypatch
):
    torch.manual_seed(0)
    left, right = torch.randn(40, 300, dtype=dtype), torch.randn(40, 256, dtype=dtype)
    left[:, 7] = 0  # equals
    monkeypatch.setattr(blocked, "WORKSPACE_BYTES", height * 256 * 17)
    monkeypatch.setattr(optional, "CPU_MIN_NUMEL", 2)
    found = {}
    for has_numba in with_and_without():
        found[has_numba] = blocked.largest_gradients(left, right, 900)
    for by_numba, by_torch in zip(*found.values(), strict=True):
        assert by_numba.dtype == by_torch.dtype
        assert torch.equal(by_numba, by_torch)


@settings(max_examples=200, deadline=None)
@given(st.data())
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_find_and_exchange_are_the_same_with_and_without(dtype, data):
    numel = data.draw(st.integers(1, 60))
    k = data.draw(st.integers(1, numel))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    indices = random_support(k, numel).to(dtype)
    queries = random_support(data.draw(st.integers(0, numel)), numel).to(dtype)
    found = scans.find(indices, queries)
    slots, is_found = support.find(indices, queries)
    assert torch.equal(found[1], is_found)
    assert torch.equal(found[0], slots)
    entering = queries[~is_found][:k]
    leaving = random_support(len(entering), k).long()
    by_torch = reselection.exchange(indices, leaving, entering)
    for name, own in zip(
        ("indices", "source", "grown"), scans.exchange(indices, leaving, entering), strict=True
    ):
        expected = getattr(by_torch, name)
        assert own.dtype == expected.dtype, name
        assert torch.equal(own, expected), name


def test_a_large_support_is_exchanged_by_numba_and_as_without(with_and_without, counted):
    torch.manual_seed(0)
    numel, k = 2**18, 2 * optional.CPU_MIN_ENTRIES
    indices, candidates = random_support(k, numel), random_support(k, numel)
    deltas, sums = torch.randn(k), torch.randn(k)
    changes = []
    by_numba = counted("exchange")
    for _ in with_and_without():
        slots, entering = reselection.grow_by_gradients(candidates, sums, indices, deltas, k // 3)
        changes.append(reselection.exchange(indices, slots, candidates[entering]))
    assert by_numba.call_count == 1
    assert torch.equal(changes[0].indices, changes[1].indices)
    assert torch.equal(changes[0].source, changes[1].source)
    assert torch.equal(changes[0].grown, changes[1].grown)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_a_step_of_many_entries_is_one_pass_and_the_same_as_without(
    state_dtype, with_and_without, counted
):
    """To rounding: torch divides by multiplying with a reciprocal."""
    k = optional.CPU_MIN_ENTRIES
    shapes = [(k,), (2, k), (k - 1,)]  # the last is too small
    by_numba = counted("adamw")
    found = {}
    for has_numba in with_and_without():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        optimizer = spiel.SpielAdamW(parameters, lr=0.01, weight_decay=0.1, state_dtype=state_dtype)
        for step in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            if step == 2:
                ages = torch.arange(k, dtype=torch.int16) % 50 + 1
                optimizer.state[parameters[0]]["age"] = ages
            optimizer.step()
        found[has_numba] = parameters, optimizer.state_dict()["state"]
    assert by_numba.call_count == 4
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-6} if state_dtype == "float32" else {"rtol": 1e-2, "atol": 1e-3}
    )
    torch.testing.assert_close(*found.values(), **tolerance)


def test_without_momentum_a_step_is_by_its_own_gradient():
    """However large the one before was: their difference would take most of its digits."""
    values, gradient, m, v = (torch.zeros(40) for _ in range(4))
    for size in (3.0, 1e-6):
        tensors = values, gradient.fill_(size), m, v, torch.ones(()).short()
        scans.adamw(*([each] for each in tensors), torch.rand(50), (0.0, 0.99), 1e-6, 0.1, 0.0)
        torch.testing.assert_close(m, gradient, rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 7])
def test_threads_share_the_entries_of_a_step_among_them(num_threads):
    """Whatever the sizes, so that a thread's part may begin and end within a parameter."""
    torch.manual_seed(0)
    sizes = (1, 40, 3, 1, 5)
    values, gradients, m, v = ([torch.rand(size) for size in sizes] for _ in range(4))
    ages = [torch.ones(()).short(), *(torch.arange(size).short() for size in sizes[1:])]
    numbers = torch.rand(50), (0.9, 0.99), 1e-6, 0.1, 0.01
    found = []
    for num in (1, num_threads):
        changed = [[each.clone() for each in own] for own in (values, m, v)]
        with patch.object(scans, "set_threads", lambda num=num: num):
            scans.adamw(changed[0], gradients, *changed[1:], ages, *numbers)
        found.append(changed)
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)
    assert not any(torch.equal(*each) for each in zip(found[0][0], values, strict=True))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_sm3_raises_its_accumulators_by_numba_and_as_without(dtype, with_and_without, counted):
    rows, cols, k = 70, 90, 2 * optional.CPU_MIN_ENTRIES
    layer = Mock(shape=(rows, cols))
    optimizer = spiel.SpielSM3([torch.nn.Parameter(torch.zeros(k))])
    by_numba = counted("raise_sm3")
    found = {}
    for has_numba in with_and_without():
        torch.manual_seed(0)
        # Rows without an entry in front, and at the end.
        layer.spiel_indices = {"default": random_support(k, 60 * cols).to(dtype) + 5 * cols}
        state = {}
        gradients = list(torch.randn(3, k))
        gradients[-1][0] = torch.nan
        us = [optimizer._raise_sparse(state, each, layer, "default") for each in gradients]
        found[has_numba] = us, state
    assert by_numba.call_count == 3
    torch.testing.assert_close(*found.values(), rtol=1e-6, atol=0, equal_nan=True)
    assert found[True][1]["row"].isnan().sum() == 1
    assert found[True][1]["row"][:5].tolist() == [0.0] * 5


@pytest.mark.parametrize(
    ("place", "other", "said"),
    [
        (2, torch.ones(9, dtype=torch.float64), "expected 9 contiguous entries in fp32, got 9 in"),
        (3, torch.ones(8), "expected 9 contiguous entries in fp32, got 8 in torch.float32"),
        (2, torch.ones(18)[::2], r"with strides \(2,\)"),
        (4, torch.ones(9, dtype=torch.int64), "1 or 9 ages in int16, got 9 in torch.int64"),
        (4, torch.ones(2).short(), "1 or 9 ages in int16, got 2 in torch.int16"),
    ],
)
def test_state_that_is_not_of_these_entries_is_refused(place, other, said):
    """What lies behind an address nobody else would ask."""
    tensors = [*torch.ones(4, 9), torch.ones(()).short()]
    tensors[place] = other
    with pytest.raises(ValueError, match=said):
        scans.adamw(*([each] for each in tensors), torch.rand(50), (0.9, 0.99), 1e-6, 0.1, 0.0)
    assert tensors[0].tolist() == [1.0] * 9


def test_parameters_of_other_dtypes_or_layouts_take_steps_too():
    parameters = [
        torch.nn.Parameter(torch.ones(2, optional.CPU_MIN_ENTRIES).t()),
        torch.nn.Parameter(torch.ones(optional.CPU_MIN_ENTRIES, dtype=torch.bfloat16)),
    ]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    spiel.SpielAdamW(parameters, lr=0.5).step()
    for parameter in parameters:
        torch.testing.assert_close(
            parameter.float(), torch.full(parameter.shape, 0.5), rtol=0, atol=1e-2
        )
