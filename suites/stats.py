"""Statistics over seeds and items: means with their uncertainty, and what is paired by them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 2000

#: Of fewer items the bootstrap is too sure: where seeds agree, of ten items chance gives one
#: difference in nine a p-value below 0.05. A sign test takes its place.
MIN_ITEMS = 30

#: Scores no further apart than this are the same, but for rounding.
SAME = 1e-9

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
    """Mean and two-sided interval by Student's t, which takes the values as a sample of a normal.

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
    """A mean difference, its interval, and the two-sided p-value of there being none.

    The p-value is None for a single seed, which cannot tell how far trainings differ; the interval
    is None for fewer than MIN_ITEMS items, and so is the p-value if they do not weigh alike.
    """

    mean: float
    low: float | None
    high: float | None
    p_value: float | None


def paired_difference(
    differences: Sequence[np.ndarray],
    weights: Sequence[float] | None = None,
    confidence: float = 0.95,
) -> Difference:
    """The mean of paired differences; of two tests the wider interval and the larger p-value.

    `differences` has one array (seeds, items) for each task, all with the same seeds: what one
    method scored above another on the same item after training with the same seed. Their mean is
    that over tasks, by `weights` or else alike, of the mean over seeds and items.

    A bootstrap knows how far items differ, but is too sure of few seeds: of three that differ more
    than items do, chance gives one difference in four a p-value below 0.05. A paired t test over
    seeds is right about seeds, but sees no items where seeds agree. With one seed the interval is
    over items alone. Of fewer than MIN_ITEMS items, as the variance of their mean counts them, the
    bootstrap is too sure as well, and an exact sign test takes its place where all items weigh
    alike; where they do not, nothing is right. Raises ValueError where there is nothing to compare.
    """
    if not differences or not all(task.size for task in differences):
        raise ValueError("a paired difference needs at least one seed and one item")
    shares = np.ones(len(differences)) if weights is None else np.asarray(weights)
    shares = shares / shares.sum()
    by_seed = shares @ [task.mean(axis=1) for task in differences]
    found = estimate(by_seed.tolist(), confidence)
    of_an_item = shares / [task.shape[1] for task in differences]
    if 1 / (shares @ of_an_item) < MIN_ITEMS:
        if found.num < 2 or not np.allclose(of_an_item, of_an_item[0]):
            return Difference(found.mean, None, None, None)
        p_value = max(_sign_test(differences, found.mean), _t_test(by_seed))
        return Difference(found.mean, None, None, p_value)
    low, high, p_value = _bootstrap(differences, shares, confidence)
    if found.half_width is None:
        return Difference(found.mean, low, high, None)
    return Difference(
        found.mean,
        min(low, found.mean - found.half_width),
        max(high, found.mean + found.half_width),
        max(p_value, _t_test(by_seed)),
    )


def _sign_test(differences: Sequence[np.ndarray], mean: float) -> float:
    """Of items being better as often as worse: two-sided, for their being so as `mean` says."""
    from scipy.stats import binomtest

    items = np.concatenate([task.mean(axis=0) for task in differences])
    items = items[np.abs(items) > SAME]
    num_like, num_told = np.count_nonzero(np.sign(items) == np.sign(mean)), len(items)
    if abs(mean) < SAME or not num_told:
        return 1.0
    return min(1.0, 2 * float(binomtest(num_like, num_told, alternative="greater").pvalue))


def _t_test(values: np.ndarray) -> float:
    """The two-sided p-value of their mean being 0, by Student's t; values must be two at least."""
    from scipy.stats import ttest_1samp

    if np.ptp(values) < SAME:  # no spread: the t statistic is 0 / 0 or infinite
        return 0.0 if abs(values[0]) > SAME else 1.0
    return float(ttest_1samp(values, 0.0).pvalue)


def _bootstrap(
    differences: Sequence[np.ndarray], shares: np.ndarray, confidence: float
) -> tuple[float, float, float]:
    """The interval of the mean over tasks by their `shares`, and its two-sided p-value.

    Each resample draws seeds, the same for all tasks, and items of each task, the same for all
    seeds: so what a seed's items share is not taken for independent (two-way bootstrap: Owen,
    Annals of Applied Statistics 1, 2007).
    """
    generator = np.random.default_rng(0)
    num_seeds = differences[0].shape[0]
    # How often each resample draws each seed, as a share: (resamples, seeds).
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_RESAMPLES)
    means = np.zeros(NUM_RESAMPLES)
    for task, share in zip(differences, shares, strict=True):
        means += share * _resampled_means(task, seeds / num_seeds, generator)
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    # A difference of exactly 0 speaks for neither side, so it counts for both.
    tail = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return float(low), float(high), min(1.0, float(2 * (tail + 1) / (NUM_RESAMPLES + 1)))


def _resampled_means(
    task: np.ndarray, seeds: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Means (resamples,) of `task` (seeds, items) under `seeds` (resamples, seeds)."""
    num_items = task.shape[1]
    means = np.empty(len(seeds))
    for index, weights in enumerate(seeds):
        drawn = generator.integers(num_items, size=num_items)
        means[index] = (weights @ task)[drawn].mean()
    return means
