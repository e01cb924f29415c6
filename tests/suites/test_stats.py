"""Intervals against figures worked out by hand."""

import numpy as np
import pytest

from suites import stats
from suites.stats import estimate, paired_difference, paired_ratio


def test_interval_is_students_t():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: 4.3027 / sqrt(3) = 2.4842
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(2.4842, abs=1e-4)
    assert found.num == 3


def test_one_value_has_no_interval():
    assert estimate([0.7]).half_width is None


def test_no_value_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])


def test_paired_ratio_takes_out_what_seeds_share():
    # Seed 1 ran on a machine twice as slow: the pairs still agree exactly.
    found = paired_ratio({0: 1.2, 1: 2.4, 2: 1.2}, {0: 1.0, 1: 2.0, 2: 1.0})
    assert found.mean == pytest.approx(1.2)
    assert found.half_width == pytest.approx(0.0, abs=1e-12)


def test_paired_ratio_uses_shared_seeds_only():
    assert paired_ratio({0: 3.0, 1: 8.0}, {0: 1.0, 2: 1.0}).mean == 3.0
    assert paired_ratio({0: 3.0}, {1: 1.0}) is None


def items(accuracy, num_seeds=3, num_items=400, seed=0):
    """Correctness (seeds, items) whose items are right with that probability."""
    generator = np.random.default_rng(seed)
    return (generator.random((num_seeds, num_items)) < accuracy).astype(float)


def test_a_difference_in_every_seed_is_significant():
    found = paired_difference([items(0.8) - items(0.6, seed=1)])
    assert found.mean == pytest.approx(0.2, abs=0.05)
    assert found.low > 0
    assert found.p_value < 0.05


def test_no_difference_is_not():
    found = paired_difference([items(0.7) - items(0.7, seed=1)])
    assert found.low < 0 < found.high
    assert found.p_value > 0.05
    assert paired_difference([np.zeros((3, 40))]).p_value == 1.0


def test_pairing_finds_what_lies_below_the_spread_of_items():
    base = items(0.5)
    better = base.copy()
    better[:, :12] = 1.0  # twelve items of 400, whatever the others do
    assert paired_difference([better - base]).low > 0


def test_one_lucky_seed_is_not_significant():
    # 300 items more make one seed no better evidence: seeds are the blocks.
    differences = np.zeros((3, 300))
    differences[0] = 1.0
    assert paired_difference([differences]).p_value > 0.05


def test_chance_seldom_makes_few_seeds_significant(monkeypatch):
    """Three seeds that differ more than items do; by the bootstrap alone one in four passed."""
    monkeypatch.setattr(stats, "NUM_RESAMPLES", 200)
    generator = np.random.default_rng(0)
    found = [
        paired_difference([generator.normal(generator.normal(0, 0.1, (3, 1)), 0.3, (3, 100))])
        for _ in range(300)
    ]
    assert 0 < sum(each.p_value < 0.05 for each in found) < 0.08 * len(found)
    assert all((each.low > 0 or each.high < 0) <= (each.p_value < 0.06) for each in found)


def test_seeds_that_agree_leave_it_to_the_items():
    differences = np.zeros((3, 40))
    differences[:, :3] = 1.0  # the same three of forty items in each seed
    assert paired_difference([differences]).p_value > 0.05
    assert paired_difference([np.ones((3, 40))]).p_value < 0.05


def test_few_items_are_judged_by_their_signs():
    """By simulation: of five that happen to be alike a bootstrap is far too sure."""
    alike = paired_difference([np.ones((3, 20))])
    assert alike == stats.Difference(1.0, None, None, pytest.approx(2 * 0.5**20))
    assert paired_difference([-np.ones((3, 5))]).p_value == pytest.approx(2 * 0.5**5)
    assert paired_difference([np.ones((1, 20))]).p_value is None
    assert paired_difference([np.zeros((3, 20))]).p_value == 1.0
    mixed = np.where(np.arange(20) < 6, -1.0, 1.0) * np.ones((3, 1))
    assert paired_difference([mixed]).p_value > 0.05
    # The mean says one thing and most items another.
    assert paired_difference([np.where(np.arange(20) < 2, 10.0, -1.0) * np.ones((3, 1))]).mean > 0
    assert (
        paired_difference([np.where(np.arange(20) < 2, 10.0, -1.0) * np.ones((3, 1))]).p_value == 1
    )
    seeds_differ = np.array([[1.0], [1.0], [-1.0]]) * np.ones(20)
    assert paired_difference([seeds_differ]).p_value > 0.05


def test_a_task_of_few_items_is_not_outvoted_by_one_of_many():
    """Half of the mean rests on five items: as uncertain as twenty of one task."""
    found = paired_difference([np.ones((3, 5)), np.ones((3, 95))])
    assert (found.low, found.p_value) == (None, None)
    assert paired_difference([np.ones((3, 10)), np.ones((3, 10))]).p_value < 0.05
    assert paired_difference([np.ones((3, 20)), np.ones((3, 20))]).low == 1.0
    assert paired_difference([np.ones((3, 5)), np.ones((3, 95))], [0.05, 0.95]).low == 1.0


def test_rounding_is_no_spread():
    values = np.full((3, 40), 0.1) + np.array([[0.0], [1e-17], [2e-17]])
    assert paired_difference([values]).p_value < 0.05
    assert paired_difference([1e-12 * np.ones((3, 40))]).p_value == 1.0
    by_seed = np.array([[0.1], [0.2], [-0.3]]) * np.ones(20)  # whose means are 4e-17
    assert stats._sign_test([by_seed], 1.0) == 1.0


def test_one_seed_has_an_interval_of_items_and_no_p_value():
    found = paired_difference([items(0.9, num_seeds=1) - items(0.5, num_seeds=1, seed=1)])
    assert found.low > 0
    assert found.p_value is None


def test_tasks_count_alike_whatever_their_size():
    found = paired_difference([np.ones((2, 20)), np.zeros((2, 1000))])
    assert found.mean == 0.5


def test_weights_decide_how_tasks_count():
    arrays = [np.ones((2, 50)), np.zeros((2, 1000)), np.full((2, 40), -1.0)]
    found = paired_difference(arrays, [0.5, 0.5, 1.0])
    assert (found.mean, found.low, found.high) == pytest.approx((-0.25, -0.25, -0.25))


def test_nothing_to_pair_is_an_error():
    with pytest.raises(ValueError, match="at least one seed and one item"):
        paired_difference([])


def test_tasks_share_the_seeds_that_are_drawn():
    """What a seed does to all tasks does not average out over tasks."""
    by_seed = np.array([[-0.5], [0.0], [0.5]]) * np.ones(40)
    low, high, _ = stats._bootstrap([by_seed] * 4, np.full(4, 0.25), 0.95)
    assert high - low > 0.9
