import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spiel.reselection import Exchange, Schedule, drop, exchange, grow_by_gradients
from spiel.support import check_support, random_support


def schedule(**changes):
    values = {
        "total_steps": 100,
        "reselection_steps": 20,
        "selection_accumulation_steps": 5,
        "initial_reselection_rate": 0.2,
        "reselection_rate_policy": "linear",
    }
    return Schedule(**{**values, **changes})


def test_windows_open_and_close_as_in_the_original():
    plan = schedule()
    assert [t for t in range(101) if plan.opens_window(t)] == [0, 19, 39, 59, 79, 99]
    assert [t for t in range(1, 101) if plan.reselects(t)] == [5, 25, 45, 65, 85]


def test_nothing_happens_after_the_last_step():
    plan = schedule(total_steps=24)
    assert [t for t in range(60) if plan.opens_window(t)] == [0, 19]
    assert [t for t in range(1, 60) if plan.reselects(t)] == [5]


def test_rates():
    linear, cosine = schedule(), schedule(reselection_rate_policy="cosine")
    assert linear.rate(5) == 1.0
    assert linear.rate(25) == pytest.approx(0.2 * 0.75)
    assert cosine.rate(5) == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.05)))
    assert cosine.rate(100) == pytest.approx(0)


def test_training_too_short_for_a_reselection_is_refused():
    with pytest.raises(ValueError, match=r"total_steps 5 is too small .* after step 5"):
        schedule(total_steps=5)


def test_drop_takes_the_smallest_first():
    deltas = torch.tensor([0.3, -0.1, 0.0, 2.0, -0.2])
    assert drop(deltas, 3).tolist() == [2, 1, 4]
    assert drop(deltas, 0).tolist() == []


def test_grow_leaves_out_what_is_active_and_stays():
    indices = torch.tensor([10, 20, 30])
    candidates = torch.tensor([10, 15, 20, 25])
    sums = torch.tensor([9.0, -1.0, 5.0, 3.0])
    # Slot 1 (index 20) is dropped: 20 may be grown again, 10 may not.
    grown = grow_by_gradients(candidates, sums, indices, torch.tensor([1]))
    assert candidates[grown].tolist() == [20]
    grown = grow_by_gradients(candidates, sums, indices, torch.tensor([2, 1]))
    assert candidates[grown].tolist() == [20, 25]


def test_an_index_both_dropped_and_grown_stays_as_it_is():
    change = exchange(torch.tensor([10, 20, 30]), torch.tensor([1, 2]), torch.tensor([20, 5]))
    assert change.indices.tolist() == [5, 10, 20]
    assert change.grown.tolist() == [True, False, False]
    assert change.source.tolist() == [2, 0, 1]
    assert change.move(torch.tensor([1.0, 2.0, 3.0])).tolist() == [0.0, 1.0, 2.0]


def test_grown_ones_take_the_slots_of_the_smallest_dropped_first():
    change = exchange(torch.tensor([1, 2, 3]), torch.tensor([2, 0]), torch.tensor([9]))
    assert change.indices.tolist() == [1, 2, 9]
    assert change.source[change.grown].tolist() == [2]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_exchange_conserves_the_support(data):
    numel = data.draw(st.integers(2, 60))
    k = data.draw(st.integers(1, numel))
    n = data.draw(st.integers(0, k))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    indices, deltas = random_support(k, numel), torch.randn(k)
    dropped = drop(deltas, n)
    candidates = random_support(data.draw(st.integers(0, numel)), numel)
    grown = grow_by_gradients(candidates, torch.randn(len(candidates)), indices, dropped)
    change: Exchange = exchange(indices, dropped, candidates[grown])
    check_support(change.indices, k, numel, "weight")
    before = dict(zip(indices.tolist(), deltas.tolist(), strict=True))
    after = dict(zip(change.indices.tolist(), change.move(deltas).tolist(), strict=True))
    for index, value in after.items():
        assert value == before.get(index, 0.0)
    kept = set(indices.tolist()) - set(indices[dropped].tolist())
    assert kept <= set(after)
    assert int(change.grown.sum()) == len(set(after) - set(before))
    assert len(grown) <= n
