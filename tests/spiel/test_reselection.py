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
    assert [t for t in range(101) if plan.opens_window(t)] == [0, 19, 39, 59, 79]
    assert [t for t in range(1, 101) if plan.reselects(t)] == [5, 25, 45, 65, 85]


def test_nothing_happens_after_the_last_step():
    plan = schedule(total_steps=24)
    assert [t for t in range(60) if plan.opens_window(t)] == [0]  # one at 19 could not close
    assert [t for t in range(1, 60) if plan.reselects(t)] == [5]
    assert [t for t in range(60) if schedule(total_steps=25).opens_window(t)] == [0, 19]


def test_rates():
    linear, cosine = schedule(), schedule(reselection_rate_policy="cosine")
    assert linear.rate(5) == 1.0
    assert linear.rate(25) == pytest.approx(0.2 * 0.75)
    assert cosine.rate(5) == pytest.approx(0.1 * (1 + math.cos(math.pi * 0.05)))
    assert cosine.rate(100) == pytest.approx(0)


def test_training_too_short_for_a_reselection_is_refused():
    with pytest.raises(ValueError, match=r"total_steps 5 is too small .* after step 5"):
        schedule(total_steps=5)


def test_drop_takes_the_smallest_and_of_equals_the_first():
    deltas = torch.tensor([0.3, -0.1, 0.0, 2.0, -0.2])
    assert drop(deltas, 3).tolist() == [False, True, True, False, True]
    assert drop(deltas, 0).tolist() == 5 * [False]
    assert drop(deltas, 5).tolist() == 5 * [True]
    assert drop(torch.zeros(4), 2).tolist() == [True, True, False, False]


def test_grow_leaves_out_what_is_active_and_stays():
    indices, candidates = torch.tensor([10, 20, 30]), torch.tensor([10, 15, 20, 25])
    sums = torch.tensor([9.0, -1.0, 5.0, 3.0])
    # 10 stays, so it cannot be grown. 20 is dropped, grown again and stays, so it takes no slot.
    slots, entering = grow_by_gradients(candidates, sums, indices, torch.tensor([3.0, 1, 2]), 1)
    assert (slots.tolist(), entering.tolist()) == ([], [])
    slots, entering = grow_by_gradients(candidates, sums, indices, torch.tensor([3.0, 1, 2]), 2)
    assert (slots.tolist(), candidates[entering].tolist()) == ([2], [25])


def test_where_candidates_run_out_the_smallest_deltas_go_first():
    indices, candidates = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 9])
    deltas = torch.tensor([0.3, 0.0, 0.1, 0.2])
    slots, entering = grow_by_gradients(candidates, torch.ones(2), indices, deltas, 3)
    assert (slots.tolist(), entering.tolist()) == ([2], [1])  # 2, the smallest, was grown again


def test_deltas_that_are_no_numbers_are_dropped_first_and_nothing_breaks():
    deltas = torch.tensor([float("nan"), 1.0, float("nan"), 2.0])
    assert drop(deltas, 1).tolist() == [True, False, False, False]
    indices, candidates = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    slots, entering = grow_by_gradients(candidates, torch.ones(4), indices, deltas, 3)
    assert (slots.tolist(), entering.tolist()) == ([0, 1, 2], [0, 1, 2])


def test_exchange_sorts_the_new_support_and_names_the_slots_each_entry_had():
    change = exchange(torch.tensor([10, 20, 30]), torch.tensor([1]), torch.tensor([5]))
    assert change.indices.tolist() == [5, 10, 30]
    assert change.grown.tolist() == [0]
    assert change.source.tolist() == [1, 0, 2]
    assert change.move(torch.tensor([1.0, 2.0, 3.0])).tolist() == [0.0, 1.0, 3.0]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_an_exchange_conserves_the_support(data):
    numel = data.draw(st.integers(2, 60))
    k = data.draw(st.integers(1, numel))
    n = data.draw(st.integers(0, k))
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    indices, deltas = random_support(k, numel), torch.randn(k).round(decimals=1)
    candidates = random_support(data.draw(st.integers(1, numel)), numel)
    sums = torch.randn(len(candidates)).round(decimals=1)  # with ties
    slots, entering = grow_by_gradients(candidates, sums, indices, deltas, n)
    change: Exchange = exchange(indices, slots, candidates[entering])
    check_support(change.indices, k, numel, "weight")
    before = dict(zip(indices.tolist(), deltas.tolist(), strict=True))
    after = dict(zip(change.indices.tolist(), change.move(deltas).tolist(), strict=True))
    assert after == expected_exchange(before, dict(zip(candidates.tolist(), sums, strict=True)), n)
    grown = [before.get(index) is None for index in after]
    assert change.grown.tolist() == [i for i, is_new in enumerate(grown) if is_new]
    assert [before[i] for i, new in zip(after, grown, strict=True) if not new] == (
        deltas[change.source][~torch.tensor(grown)].tolist()
    )


def expected_exchange(before, candidates, n):
    """The same by the paper's words on dictionaries index -> delta, and index -> gradient."""
    dropped = sorted(before, key=lambda index: abs(before[index]))[:n]
    free = [index for index in candidates if index not in before or index in dropped]
    grown = sorted(free, key=lambda index: -abs(candidates[index]))[:n]
    fresh = [index for index in grown if index not in before]
    away = [index for index in dropped if index not in grown][: len(fresh)]
    after = {index: delta for index, delta in before.items() if index not in away}
    return dict(sorted((after | dict.fromkeys(fresh, 0.0)).items()))
