import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spiel.ranking import kth_largest, largest, places

FLOATS = st.floats(width=16, allow_nan=True, allow_infinity=True)


@given(st.lists(FLOATS, min_size=1), st.data())
def test_largest_are_exactly_k_and_of_equals_the_first(values, data):
    k = data.draw(st.integers(0, len(values)))
    infinite = [float("inf") if value != value else value for value in values]
    order = sorted(range(len(values)), key=lambda i: -infinite[i])  # stable
    expected = sorted(order[:k])
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert largest(torch.tensor(values, dtype=dtype), k).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kth_largest(dtype):
    ranks = torch.tensor([3.0, 1.0, 2.0, 3.0], dtype=dtype)
    assert [kth_largest(ranks, k).item() for k in (1, 2, 3, 4)] == [3.0, 3.0, 2.0, 1.0]


def test_more_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"k must be in \[0, 2\], got 3"):
        largest(torch.zeros(2), 3)


@given(st.lists(st.booleans()), st.integers(1, 3))
def test_places_are_those_of_torch(marks, stride):
    mask = torch.tensor(marks, dtype=torch.bool)[::stride]
    found = places(mask)
    assert found.dtype == torch.int64
    assert torch.equal(found, mask.nonzero().squeeze(1))
