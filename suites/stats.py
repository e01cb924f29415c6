"""Statistics over seeds: means with their uncertainty, ratios paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over `num` values, and half the width of its interval: None for fewer than two.

    So is the standard error of the mean.
    """

    mean: float
    half_width: float | None
    num: int
    standard_error: float | None = None


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean and interval by Student's t, which takes the values as a sample of a normal.

    One value has no interval. Raises ValueError for none.
    """
    if not values:
        raise ValueError("an estimate needs at least one value, got none")
    mean, num = statistics.fmean(values), len(values)
    if num < 2:
        return Estimate(mean, None, num)
    from scipy.stats import t

    error = statistics.stdev(values) / math.sqrt(num)
    half_width = float(t.ppf((1 + confidence) / 2, num - 1)) * error
    return Estimate(mean, half_width, num, error)


def paired_ratio(
    values: Mapping[int, float], base: Mapping[int, float], confidence: float = 0.95
) -> Estimate | None:
    """Mean of `values[seed] / base[seed]` over the seeds that both have; None if they share none.

    Pairing takes out what a seed's cells have in common: its data order, and the state that the
    machine was in while they ran one after the other.
    """
    ratios = [values[seed] / base[seed] for seed in sorted(values) if seed in base]
    return estimate(ratios, confidence) if ratios else None
