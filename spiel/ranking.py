"""Which entries rank highest, and where."""

from __future__ import annotations

import numpy as np
import torch


def largest(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """Places [k], ascending, of the highest of `ranks` [n]; of ties the first, and NaN counts as
    infinity.

    Raises:
        ValueError: there are fewer than `k`, or `k` is negative.
    """
    if not 0 <= k <= len(ranks):
        raise ValueError(f"k must be in [0, {len(ranks)}], got {k}")
    if k == 0:
        return torch.empty(0, dtype=torch.int64, device=ranks.device)
    ranks = ranks.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    bound = kth_largest(ranks, k)
    found = places(ranks >= bound)
    surplus = len(found) - k
    if surplus > 0:
        equals = places(ranks.index_select(0, found) == bound)
        stays = torch.ones(len(found), dtype=torch.bool, device=ranks.device)
        found = found.index_select(0, places(stays.index_fill_(0, equals[-surplus:], False)))
    return found


def places(mask: torch.Tensor) -> torch.Tensor:
    """Where `mask` [n] is True: places [m], ascending, in int64."""
    if mask.device.type == "cpu":  # several times as fast
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.nonzero().squeeze(1)


def count(mask: torch.Tensor) -> int:
    """How many of `mask` [n] are True."""
    if mask.device.type == "cpu":  # many times as fast
        return int(np.count_nonzero(mask.numpy()))
    return int(mask.sum())


def kth_largest(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """The `k`-th largest of `ranks` [n], counted from 1."""
    if ranks.device.type == "cpu" and ranks.dtype == torch.float32:  # many times as fast
        place = len(ranks) - k
        return torch.from_numpy(np.partition(ranks.numpy(), place)[place : place + 1])[0]
    # On a GPU kthvalue has one of its processors at work.
    return ranks.topk(k, sorted=False).values.amin()
