"""Intervals against figures worked out by hand."""

import pytest

from suites.stats import estimate, paired_ratio


def test_interval_is_students_t():
    # mean 2, standard deviation 1, t(0.975, 2) = 4.3027: 4.3027 / sqrt(3) = 2.4842
    found = estimate([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(2.4842, abs=1e-4)
    assert found.num == 3


def test_interval_widens_with_confidence():
    values = [0.1, 0.4, 0.2, 0.3]
    assert estimate(values, 0.99).half_width > estimate(values, 0.95).half_width


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
