"""What SpIEL asks of data-parallel ranks: to agree on gradients, and so on supports.

Without an initialised process group of several ranks every function here does nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


def is_parallel() -> bool:
    """Whether there are several ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def average_(tensor: torch.Tensor) -> None:
    """Replaces `tensor` by its mean over ranks, as DistributedDataParallel does to gradients."""
    if is_parallel():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def broadcast_(tensor: torch.Tensor) -> None:
    """Replaces `tensor` by that of rank 0."""
    if is_parallel():
        dist.broadcast(tensor, src=0)


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
    dist.all_reduce(reduced, getattr(dist.ReduceOp, how))
    return [bool(flag) for flag in reduced.tolist()]


def check_equal(tensor: torch.Tensor, what: str) -> None:
    """Raises RuntimeError unless the integer `tensor` is the same on all ranks."""
    if not is_parallel():
        return
    low, high = tensor.clone(), tensor.clone()
    dist.all_reduce(low, dist.ReduceOp.MIN)
    dist.all_reduce(high, dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise RuntimeError(f"{what} differ between data-parallel ranks")
