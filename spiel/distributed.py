"""What SpIEL asks of data-parallel ranks: to agree on gradients, and so on supports.

Without an initialised process group of several ranks every function here does nothing. All ranks
call the functions in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


def is_parallel() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


#: The process group of all ranks, and the one of SpIEL's own beside it.
_groups: tuple[Any, Any] | None = None


def own_group() -> Any:
    """A process group of all ranks that nobody else uses.

    SpIEL exchanges gradients in the midst of backward, when DistributedDataParallel sends its
    buckets: in one group each had to be sent at the same place between the other's on every rank,
    and a module that takes no part on a rank has its bucket sent earlier there. The first call is
    that of a Reselector which is being made, on all ranks at the same time.
    """
    global _groups
    if _groups is None or _groups[0] is not dist.group.WORLD:
        _groups = dist.group.WORLD, dist.new_group()
    return _groups[1]


def average_(tensor: torch.Tensor) -> None:
    """Replaces `tensor` by its mean over ranks, as DistributedDataParallel does to gradients."""
    if is_parallel():
        dist.all_reduce(tensor, group=own_group())
        tensor /= dist.get_world_size()


def broadcast_(tensor: torch.Tensor) -> None:
    """Replaces `tensor` by that of rank 0."""
    if is_parallel():
        dist.broadcast(tensor, src=0, group=own_group())


def on_all_ranks(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag whether it is set on every rank."""
    return _reduce_flags(flags, device, "MIN")


def on_any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """For each flag whether it is set on some rank."""
    return _reduce_flags(flags, device, "MAX")


def _reduce_flags(flags: Sequence[bool], device: torch.device, how: str) -> list[bool]:
    if not is_parallel():
        return list(flags)
    reduced = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(reduced, getattr(dist.ReduceOp, how), group=own_group())
    return [bool(flag) for flag in reduced.tolist()]


def check_equal(tensor: torch.Tensor, what: str) -> None:
    """Raises RuntimeError unless the integer `tensor` is the same on all ranks."""
    if not is_parallel():
        return
    low, high = tensor.clone(), tensor.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN, group=own_group())
    dist.all_reduce(high, dist.ReduceOp.MAX, group=own_group())
    if not torch.equal(low, high):
        raise RuntimeError(f"{what} differ between data-parallel ranks")
