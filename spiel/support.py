"""The support of one weight: which of its entries are trained.

A support is a 1-D integer tensor of flat indices into a weight seen as [rows, cols] in row-major
order, sorted and unique. It is int32 wherever the weight has fewer than 2**31 entries.
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch

from spiel.ranking import count, places

INT32_LIMIT = 2**31


def index_dtype(numel: int) -> torch.dtype:
    """The dtype of indices into a weight of `numel` entries: int32 where it fits, else int64."""
    return torch.int32 if numel < INT32_LIMIT else torch.int64


def check_support(indices: torch.Tensor, k: int, numel: int, where: str) -> None:
    """Raises ValueError, naming `where`, unless this is a support of `k` of `numel` entries.

    TypeError if it is no tensor.
    """
    if not isinstance(indices, torch.Tensor):
        kind = type(indices).__name__
        raise TypeError(f"{where}: indices must be a tensor (torch.as_tensor), got {kind}")
    if indices.dim() != 1 or indices.is_floating_point():
        raise ValueError(f"{where}: indices must be a 1-D integer tensor, got {indices.dtype}")
    if len(indices) != k:
        raise ValueError(f"{where}: expected {k} indices, got {len(indices)}")
    if k == 0:
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= numel:
        bad = low if low < 0 else high
        raise ValueError(f"{where}: index {bad} is out of range, the weight has {numel} entries")
    steps = indices[1:] > indices[:-1]
    if not bool(steps.all()):
        at = int(steps.logical_not().nonzero()[0])
        kind = "duplicated" if indices[at] == indices[at + 1] else "unsorted"
        raise ValueError(
            f"{where}: indices are {kind} at position {at + 1}: {int(indices[at + 1])}"
        )


def check_loaded(
    indices: torch.Tensor | None, deltas: torch.Tensor | None, k: int, numel: int, where: str
) -> None:
    """Raises ValueError, naming `where`, unless these are a support and its deltas, or both None.

    What is on the meta device has no values to check.
    """
    if (indices is None) != (deltas is None):
        missing = "indices" if indices is None else "delta values"
        raise ValueError(f"{where}: the state dict lacks the {missing}")
    if indices is not None and not indices.is_meta:
        check_support(indices, k, numel, where)
    if deltas is None or deltas.is_meta:
        return
    if deltas.shape != (k,):
        raise ValueError(f"{where}: expected {k} delta values, got {list(deltas.shape)}")
    if not bool(torch.isfinite(deltas).all()):
        raise ValueError(f"{where}: the delta values contain NaN or infinity")


def random_support(k: int, numel: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """`k` of `numel` indices, uniformly at random without replacement, sorted, on `device`.

    Drawn from torch's global CPU generator, so that a seed gives the same support on any device.
    Takes `numel` bytes meanwhile.
    """
    dtype = index_dtype(numel)
    if torch.device(device).type == "meta":  # shapes only: nothing to choose
        return torch.empty(k, dtype=dtype, device=device)
    # Of the fewer ones, which are wanted or which are not, those drawn twice are drawn again.
    num_drawn = min(k, numel - k)
    is_drawn = torch.zeros(numel, dtype=torch.bool, device="cpu")
    while missing := num_drawn - count(is_drawn):
        is_drawn[torch.randint(numel, (missing,), device="cpu")] = True
    wanted = is_drawn if num_drawn == k else is_drawn.logical_not_()
    return places(wanted).to(dtype).to(device)


def row_pointers(indices: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """CSR row pointers [rows + 1] of a support, in the indices' dtype."""
    starts = torch.arange(rows + 1, device=indices.device, dtype=indices.dtype) * cols
    return torch.searchsorted(indices, starts, out_int32=indices.dtype == torch.int32)


def split_index(indices: torch.Tensor, cols: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, each [k], of flat indices."""
    rows = torch.div(indices, cols, rounding_mode="floor")
    return rows, indices - rows * cols


def find(indices: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `queries` its slot in a support, and whether it is in it at all.

    Where it is not, the slot is that of some other index; the support is not empty.
    """
    slots = torch.searchsorted(indices, queries.to(indices.dtype))
    slots.clamp_(max=len(indices) - 1)
    return slots, indices[slots] == queries


def version_of(indices: torch.Tensor) -> int | None:
    """How often a support was written into; None if it was made in inference mode, which counts
    nothing.
    """
    return None if indices.is_inference() else indices._version


class Seen:
    """Some supports as they are now, to tell later whether they still are."""

    def __init__(self, supports: Collection[torch.Tensor]) -> None:
        self._supports = tuple(supports)
        self._versions = [version_of(indices) for indices in supports]

    def is_of(self, supports: Collection[torch.Tensor]) -> bool:
        """Whether these are the same tensors, and none was written into since."""
        return (
            len(supports) == len(self._supports)
            and all(map(operator.is_, supports, self._supports))
            and self._versions == [version_of(indices) for indices in supports]
        )
