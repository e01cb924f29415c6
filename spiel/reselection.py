"""When the support changes and how: the schedule, what is dropped, what is grown.

Pure functions on the tensors of one weight; `spiel.reselector` drives them over a model. Source of
every formula: "Scaling Sparse Fine-Tuning to Large Language Models" (arXiv 2401.16405) and its
code. Steps t are optimizer steps, counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch

from spiel.ops import optional
from spiel.ranking import count, largest, places
from spiel.support import find


@dataclass(frozen=True)
class Schedule:
    """The steps at which growth windows open and reselections happen.

    Fields as in SpielConfig; `total_steps` is the length of training in optimizer steps.

    Raises:
        ValueError: training is over before the first reselection.
        TypeError: `total_steps` is no integer.
    """

    total_steps: int
    reselection_steps: int
    selection_accumulation_steps: int
    initial_reselection_rate: float
    reselection_rate_policy: str

    def __post_init__(self) -> None:
        if not isinstance(self.total_steps, Integral):
            raise TypeError(f"total_steps must be an integer, got {self.total_steps!r}")
        if self.total_steps <= self.selection_accumulation_steps:
            raise ValueError(
                f"total_steps {self.total_steps} is too small for one reselection, which comes "
                f"after step {self.selection_accumulation_steps}: train longer, or lower "
                "selection_accumulation_steps"
            )

    def opens_window(self, t: int) -> bool:
        """Whether a growth window opens after step t (t = 0: before the first), that can close."""
        closes = t + 1 + self.selection_accumulation_steps
        return t == 0 or ((t + 1) % self.reselection_steps == 0 and closes <= self.total_steps)

    def reselects(self, t: int) -> bool:
        """Whether the growth window closes and the support changes after step t."""
        on_time = t % self.reselection_steps == self.selection_accumulation_steps
        return on_time and t <= self.total_steps

    def rate(self, t: int, is_random: bool = True) -> float:
        """The share of the deltas that is replaced at step t.

        `is_random`: the support was drawn at random before step 1, and nothing is learned yet.
        """
        progress = t / self.total_steps
        if self.reselection_rate_policy == "cosine":
            return self.initial_reselection_rate * (1 + math.cos(math.pi * progress)) / 2
        if t == self.selection_accumulation_steps and is_random:
            return 1.0  # the whole random support goes
        return self.initial_reselection_rate * (1 - progress)


@dataclass(frozen=True)
class Exchange:
    """A change of one support. k entries, in the order of the new, sorted indices.

    `source` [k] is the slot that each entry had before, or for a grown one a slot that was left;
    `grown` [m] has the places of the new entries, whose delta starts at 0, in ascending order.
    """

    indices: torch.Tensor
    source: torch.Tensor
    grown: torch.Tensor

    def move(self, values: torch.Tensor) -> torch.Tensor:
        """Per-entry values [k] brought to the new order, 0 for grown entries."""
        return values.index_select(0, self.source).index_fill_(0, self.grown, 0)


def drop(deltas: torch.Tensor, n: int) -> torch.Tensor:
    """A mask [k] of the `n` deltas of smallest magnitude: NaN first, of ties the lowest index."""
    dropped = torch.zeros(len(deltas), dtype=torch.bool, device=deltas.device)
    return dropped.index_fill_(0, largest(deltas.detach().abs().neg_(), n), True)


def grow_by_gradients(
    candidates: torch.Tensor,
    gradient_sums: torch.Tensor,
    indices: torch.Tensor,
    deltas: torch.Tensor,
    n: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """AG: which slots `n` grown entries take, and which candidates: places [m] of both, ascending.

    The `n` smallest `deltas` [k] are dropped. Grown are the `n` candidates [c] of largest |summed
    gradient| among those that are not active, or are dropped: such a one stays exactly as it is,
    and needs no slot. So m is below n by as many as stay, or where candidates run out; then the
    smallest deltas go first.
    """
    dropped = drop(deltas, n)
    if optional.are_for_numba(indices.device, len(indices)):
        slots, is_active = optional.module("scans").find(indices, candidates)
    else:
        slots, is_active = find(indices, candidates)
    stays = is_active & dropped.index_select(0, slots).logical_not_()
    ranks = gradient_sums.abs().masked_fill_(stays, -1)
    grown = largest(ranks, min(n, len(stays) - count(stays)))
    was_active = is_active.index_select(0, grown)
    returns = slots.index_select(0, grown.index_select(0, places(was_active)))
    entering = grown.index_select(0, places(was_active.logical_not_()))
    leaving = dropped.index_fill_(0, returns, False)
    if len(entering) < n - len(returns):
        leaving = drop(
            deltas.detach().masked_fill(leaving.logical_not_(), torch.inf), len(entering)
        )
    return places(leaving), entering


def exchange(indices: torch.Tensor, slots: torch.Tensor, entering: torch.Tensor) -> Exchange:
    """Puts the flat indices `entering` [m] in the place of those in `slots` [m].

    `entering` is sorted and has no index that is active; `slots` is ascending.
    """
    entering = entering.to(indices.dtype)
    if optional.are_for_numba(indices.device, len(indices)):
        return Exchange(*optional.module("scans").exchange(indices, slots, entering))
    is_staying = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    staying = places(is_staying.index_fill_(0, slots, False))
    kept = indices[staying]
    # Before the j-th that enters stand those of the kept that are smaller, and j entering ones.
    order = torch.arange(len(slots), device=indices.device)
    grown = torch.searchsorted(kept, entering).add_(order)
    is_old = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    old = places(is_old.index_fill_(0, grown, False))
    changed = torch.empty_like(indices).index_copy_(0, grown, entering).index_copy_(0, old, kept)
    source = torch.empty_like(indices, dtype=torch.int64)
    source.index_copy_(0, grown, slots).index_copy_(0, old, staying)
    return Exchange(changed, source, grown)
