"""Statistics over seeds and items: means with their uncertainty, and what is paired by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

NUM_RESAMPLES = 2000

#: Below this p-value a difference is called significant.
SIGNIFICANCE = 0.05


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


@dataclass(frozen=True)
class Difference:
    """A mean difference, its 95 % interval, and the two-sided p-value of there being none."""

    mean: float
    low: float
    high: float
    p_value: float


def paired_difference(
    differences: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> Difference:
    """Bootstraps the mean of paired differences, over items within blocks of seeds.

    `differences` has one array (seeds, items) for each task, all with the same seeds: what one
    method scored above another on the same item after training with the same seed. Their mean is
    that over tasks, by `weights` or else alike, of the mean over seeds and items. Each resample
    draws seeds, the same for all tasks, and items of each task, the same for all seeds: so what a
    seed's items share is not taken for independent (two-way bootstrap: Owen, Annals of Applied
    Statistics 1, 2007). With one seed the interval is over items alone. Raises ValueError where
    there is nothing to compare.
    """
    import numpy as np

    if not differences or not all(task.size for task in differences):
        raise ValueError("a paired difference needs at least one seed and one item")
    generator = np.random.default_rng(0)
    num_seeds = differences[0].shape[0]
    # How often each resample draws each seed, as a share: (resamples, seeds).
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), num_resamples)
    shares = np.ones(len(differences)) if weights is None else np.asarray(weights)
    shares = shares / shares.sum()
    means = np.zeros(num_resamples)
    for task, share in zip(differences, shares, strict=True):
        means += share * _resampled_means(task, seeds / num_seeds, generator)
    low, high = np.quantile(means, (0.025, 0.975))
    # A difference of exactly 0 speaks for neither side, so it counts for both.
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return Difference(
        mean=float(shares @ [task.mean() for task in differences]),
        low=float(low),
        high=float(high),
        p_value=min(1.0, float(2 * (tail + 1) / (num_resamples + 1))),
    )


def _resampled_means(
    task: np.ndarray, seeds: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Means (resamples,) of `task` (seeds, items) under `seeds` (resamples, seeds)."""
    import numpy as np

    num_items = task.shape[1]
    means = np.empty(len(seeds))
    for index, weights in enumerate(seeds):
        drawn = generator.integers(num_items, size=num_items)
        means[index] = (weights @ task)[drawn].mean()
    return means
