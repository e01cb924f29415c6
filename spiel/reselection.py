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
        """Whether a growth window opens after step t (t = 0: before the first)."""
        return t < self.total_steps and (t == 0 or (t + 1) % self.reselection_steps == 0)

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

    `source` [k] is the slot that each entry had before, or for a grown one the slot it took over;
    `grown` [k] is True for the entries that are new, whose delta starts at 0.
    """

    indices: torch.Tensor
    source: torch.Tensor
    grown: torch.Tensor

    def move(self, values: torch.Tensor) -> torch.Tensor:
        """Per-entry values [k] brought to the new order, 0 for grown entries."""
        return values[self.source].masked_fill_(self.grown, 0)


def drop(deltas: torch.Tensor, n: int) -> torch.Tensor:
    """Slots of the `n` deltas of smallest magnitude, smallest first; the first of equals."""
    return _least(deltas.detach().abs(), n)


def grow_by_gradients(
    candidates: torch.Tensor,
    gradient_sums: torch.Tensor,
    indices: torch.Tensor,
    dropped: torch.Tensor,
) -> torch.Tensor:
    """AG: places among `candidates` [c] to grow, largest |summed gradient| first.

    As many as are dropped, or fewer where the candidates run out. A candidate that is active and
    stays cannot be grown; one that is about to be dropped can, and then stays as it is.
    """
    staying = torch.ones(len(indices), dtype=torch.bool, device=indices.device)
    staying[dropped] = False
    slots, is_active = find(indices, candidates)
    free = (is_active & staying[slots]).logical_not_().nonzero().squeeze(1)
    return free[_least(-gradient_sums[free].abs(), len(dropped))]


def _least(keys: torch.Tensor, n: int) -> torch.Tensor:
    """Places of the `n` smallest keys, smallest first; the first of equals. All if there are less.

    Sorts only those that can be among them.
    """
    if n >= len(keys):
        return keys.sort(stable=True).indices
    if n == 0:
        return torch.empty(0, dtype=torch.int64, device=keys.device)
    near = (keys <= keys.kthvalue(n).values).nonzero().squeeze(1)
    return near[keys[near].sort(stable=True).indices[:n]]


def exchange(indices: torch.Tensor, dropped: torch.Tensor, entering: torch.Tensor) -> Exchange:
    """Puts the flat indices `entering` in the place of those in the slots `dropped`.

    Both come in order of preference. An index in both lists stays exactly as it is; the others
    enter in pairs, until either list ends. Of active indices only those in `dropped` may enter.
    """
    entering = entering.to(indices.dtype)
    at, is_active = find(indices, entering)
    is_kept = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
    is_kept[at[is_active]] = True
    slots = dropped[is_kept[dropped].logical_not_()]
    fresh = entering[is_active.logical_not_()]
    num = min(len(slots), len(fresh))
    changed = indices.clone()
    changed[slots[:num]] = fresh[:num]
    grown = torch.zeros(len(indices), dtype=torch.bool, device=indices.device)
    grown[slots[:num]] = True
    changed, source = changed.sort()
    return Exchange(changed, source, grown[source])
