import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiel.support import check_support, find, random_support, row_pointers, split_index


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 2000), st.floats(0, 1), st.integers(0, 2**31))
def test_random_support_is_a_support_of_the_size_asked_for(numel, share, seed):
    torch.manual_seed(seed)
    k = int(numel * share)
    check_support(random_support(k, numel), k, numel, "weight")


def test_random_support_is_uniform_and_follows_the_seed():
    counts = torch.zeros(40)
    for seed in range(2000):
        torch.manual_seed(seed)
        counts[random_support(10, 40).long()] += 1
    assert counts.min() > 400  # expected 500, standard deviation 19
    assert counts.max() < 600
    torch.manual_seed(7)
    first = random_support(10, 40)
    torch.manual_seed(7)
    assert torch.equal(first, random_support(10, 40))


def test_indices_are_int32_where_they_fit():
    assert random_support(3, 100).dtype == torch.int32
    assert random_support(3, 2**31 - 1, "meta").dtype == torch.int32
    assert random_support(3, 2**31, "meta").dtype == torch.int64


@pytest.mark.parametrize(
    ("indices", "fault"),
    [
        ([0, 1], "expected 3 indices, got 2"),
        ([-1, 1, 2], "index -1 is out of range"),
        ([0, 1, 12], "index 12 is out of range"),
        ([0, 2, 2], "duplicated at position 2: 2"),
        ([0, 5, 2], "unsorted at position 2: 2"),
    ],
)
def test_a_bad_support_is_refused_by_name_and_fault(indices, fault):
    with pytest.raises(ValueError, match=f"q_proj: .*{fault}"):
        check_support(torch.tensor(indices), 3, 12, "q_proj")


def test_row_pointers_and_columns_are_those_of_csr():
    dense = torch.zeros(5, 7)
    indices = torch.tensor([1, 6, 14, 15, 34], dtype=torch.int32)
    dense.view(-1)[indices.long()] = 1
    csr = dense.to_sparse_csr()
    pointers = row_pointers(indices, 5, 7)
    assert pointers.dtype == torch.int32
    assert pointers.tolist() == csr.crow_indices().tolist()
    rows, cols = split_index(indices, 7)
    assert cols.tolist() == csr.col_indices().tolist()
    assert rows.tolist() == [0, 0, 2, 2, 4]


def test_find():
    slots, found = find(torch.tensor([2, 5, 9], dtype=torch.int32), torch.tensor([9, 1, 2, 10]))
    assert found.tolist() == [True, False, True, False]
    assert slots[found].tolist() == [2, 0]
