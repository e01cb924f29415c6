"""Dense products a block of rows at a time, in one bounded workspace: the weight-sized result
never exists. See `spiel.ops.reference` for what each op computes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.weak import WeakIdKeyDictionary

from spiel.ops import optional
from spiel.ops.autocast import without_autocast
from spiel.ranking import kth_largest, largest, places
from spiel.support import index_dtype, version_of

#: The most memory an op may take beside its operands and its result.
WORKSPACE_BYTES = 64 * 2**20

#: Bytes of workspace an entry of a block needs while its largest entries are picked: the fp32
#: value, its magnitude, a mask, and an int64 position for each entry that passes the mask.
_BYTES_PER_ENTRY = 4 + 4 + 1 + 8

#: Only operands at addresses of whole 16 bytes are read by the fast dense products of GPUs, whose
#: tiles have so many rows.
ROWS_MULTIPLE = 128

#: One rank in so many is sampled (a prime, so that no column of common sizes is left out; so many
#: that most lines of the cache are passed over), and so many more than wanted are let through, lest
#: the sample's noise leave too few.
SAMPLE_STRIDE, SAMPLE_MARGIN = 67, 1.25

#: Done to each fp32 block in place before it is read, as a sum over data-parallel ranks.
Reduce = Callable[[torch.Tensor], None]

#: Entries -> what they are ranked by.
Rank = Callable[[torch.Tensor], torch.Tensor]

#: Ranks and a number k -> places of the k highest, ascending.
Best = Callable[[torch.Tensor, int], torch.Tensor]


def row_blocks(rows: int, cols: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (start, stop) whose blocks fit the workspace.

    They start at multiples of ROWS_MULTIPLE, if so many fit.
    """
    height = max(1, WORKSPACE_BYTES // (_BYTES_PER_ENTRY * cols))
    if height > ROWS_MULTIPLE:
        height -= height % ROWS_MULTIPLE
    for start in range(0, rows, height):
        yield start, min(start + height, rows)


class _Kept(threading.local):
    """The block of products that this thread formed last, on a CPU."""

    block: torch.Tensor | None = None


_kept = _Kept()


def forget_block() -> None:
    """Lets go of the memory kept for the next product; for the end of a backward pass."""
    _kept.block = None


def _kept_block(rows: int, cols: int) -> torch.Tensor:
    """Memory [rows, cols] in fp32 that is most likely in the cache; from the system it would cost
    a tenth of the product.
    """
    if _kept.block is None or len(_kept.block) < rows * cols:
        _kept.block = torch.empty(rows * cols, dtype=torch.float32, device="cpu")
    return _kept.block[: rows * cols].view(rows, cols)


def _product(left_TB: torch.Tensor, right_TC: torch.Tensor) -> torch.Tensor:
    """left.T @ right with at least fp32 accumulation and an fp32 result, which on a CPU lives until
    the next product.
    """
    if left_TB.dtype == torch.float64:
        return (left_TB.t() @ right_TC).float()
    if left_TB.is_cuda:
        if left_TB.dtype == torch.float32:
            return left_TB.t() @ right_TC
        return torch.mm(left_TB.t(), right_TC, out_dtype=torch.float32)
    block = _kept_block(left_TB.shape[1], right_TC.shape[1])
    return torch.mm(left_TB.float().t(), right_TC, out=block)


def _operands(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Brings both to the dtype the product is made in: on a CPU at least fp32, once for all."""
    left, right = left.detach(), right.detach().to(left.dtype)
    if left.dtype not in (torch.float32, torch.float64) and not left.is_cuda:
        right = right.float()
    return left, right


class BlockEntries:
    """The entries at each of several supports of a matrix [rows, cols] that comes in `row_blocks`.

    `values` has those of each support [k] in fp32, as far as blocks were read.
    """

    def __init__(self, supports: Sequence[torch.Tensor], rows: int, cols: int) -> None:
        self._supports, self._cols = supports, cols
        starts = [start for start, _ in row_blocks(rows, cols)]
        inner = [start * cols for start in starts[1:]]
        cuts = [pairwise([0, *_kept_cuts(each, inner), len(each)]) for each in supports]
        #: For each support, first row of a block -> where its part of the support begins and ends.
        self._parts = [dict(zip(starts, own, strict=True)) for own in cuts]
        self.values = [
            torch.empty(len(each), dtype=torch.float32, device=each.device) for each in supports
        ]

    def read(self, start: int, block: torch.Tensor) -> None:
        """Takes what is wanted of the block whose first row is `start`."""
        for indices, parts, own in zip(self._supports, self._parts, self.values, strict=True):
            here = slice(*parts[start])
            in_block = indices[here] - start * self._cols if start > 0 else indices[here]
            torch.index_select(block.reshape(-1), 0, in_block, out=own[here])


@without_autocast
def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32."""
    left_TR, right_TC = _operands(left_TR, right_TC)
    shape = left_TR.shape[1], right_TC.shape[1]
    entries = BlockEntries(supports, *shape)
    for start, stop in row_blocks(*shape):
        entries.read(start, _product(left_TR[:, start:stop], right_TC))
    return entries.values


@without_autocast
def largest_gradients(
    left_TR: torch.Tensor,
    right_TC: torch.Tensor,
    k: int,
    reduce: Reduce | None = None,
    entries: BlockEntries | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The support of the `k` largest |entries| of left.T @ right, and those entries in fp32.

    Every block is read by `entries`, then seen by `reduce`, and then ranked.
    """
    left_TR, right_TC = _operands(left_TR, right_TC)

    def block(start: int, stop: int) -> torch.Tensor:
        values = _product(left_TR[:, start:stop], right_TC)
        if entries is not None:
            entries.read(start, values)
        if reduce is not None:
            reduce(values)
        return values.reshape(-1)

    shape = left_TR.shape[1], right_TC.shape[1]
    indices, values = _largest(block, torch.abs, largest, *shape, k, left_TR.device)
    return indices.to(index_dtype(shape[0] * shape[1])), values


def largest_products(
    row: torch.Tensor, col: torch.Tensor, k: int, exclude: torch.Tensor
) -> torch.Tensor:
    """The support of the `k` largest row x col products outside `exclude`, or of all there are.

    `row` [rows] and `col` [cols] are not negative; `exclude` is a support.
    """
    cols = len(col)
    row, col = _near_one(row), _near_one(col)

    def block(start: int, stop: int) -> torch.Tensor:
        products = torch.outer(row[start:stop], col).reshape(-1)
        lo, hi = _cuts(exclude, [start * cols, stop * cols])
        return products.index_fill_(0, exclude[lo:hi].long() - start * cols, -1.0)

    indices, values = _largest(block, torch.Tensor.detach, _as_topk, len(row), cols, k, row.device)
    return indices[values >= 0]


def _near_one(values: torch.Tensor) -> torch.Tensor:
    """`values` times the power of two that brings the largest of them near 1, in fp32: their
    products rank as before, and the largest neither vanish nor overflow.
    """
    wide = values.double()
    return torch.ldexp(wide, -torch.frexp(wide.amax()).exponent).float()


def _as_topk(ranks: torch.Tensor, k: int) -> torch.Tensor:
    """As `largest`, but equal ranks fall as `torch.topk` lets them, as in the original code: MA's
    products are equal wherever the accumulators of rows and columns mirror each other.
    """
    return ranks.topk(k, sorted=False).indices.sort().values


def _highest(
    entries: torch.Tensor, rank: Rank, best: Best, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the `k` entries of highest rank, ascending, and these entries; of many, those below
    a sampled quantile are not looked at.
    """
    if len(entries) >= 2**16 and 8 * k <= len(entries):
        sample = rank(entries[::SAMPLE_STRIDE]).contiguous()
        share = min(len(sample), round(SAMPLE_MARGIN * k / SAMPLE_STRIDE) + 1)
        where, passing = _above(entries, rank, kth_largest(sample, share))
        if len(passing) >= k:
            kept = best(rank(passing), k)
            return where.index_select(0, kept), passing.index_select(0, kept)
    where = best(rank(entries), k)
    return where, entries.index_select(0, where)


def _above(
    entries: torch.Tensor, rank: Rank, bound: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the entries whose rank is higher, or NaN, ascending, and these entries."""
    if rank is torch.abs and optional.is_for_numba(entries.device, len(entries)):
        found: tuple[torch.Tensor, torch.Tensor]
        found = optional.module("scans").above(entries, float(bound))
        return found
    where = places((rank(entries) <= bound).logical_not_())
    return where, entries.index_select(0, where)


#: Support -> its version, and where it was cut at which bounds.
_CUTS = WeakIdKeyDictionary()


def _kept_cuts(indices: torch.Tensor, bounds: list[int]) -> list[int]:
    """`_cuts` of a support that is asked for again: on a GPU each answer waits for all its work."""
    if not bounds:
        return []
    now = version_of(indices)
    version, known_bounds, cuts = _CUTS.get(indices, (None, None, []))
    if now is None or version != now or known_bounds != bounds:
        cuts = _cuts(indices, bounds)
        _CUTS[indices] = now, bounds, cuts
    return cuts


def _cuts(indices: torch.Tensor, bounds: list[int]) -> list[int]:
    """Where each of `bounds` falls in the sorted `indices`."""
    edges = torch.tensor(bounds, dtype=torch.int64, device=indices.device)
    if indices.dtype == torch.int32:  # a bound one past the last entry may not fit
        edges = edges.clamp_(max=torch.iinfo(torch.int32).max).int()
    return torch.searchsorted(indices, edges).tolist()


def _largest(
    block: Callable[[int, int], torch.Tensor],
    rank: Rank,
    best: Best,
    rows: int,
    cols: int,
    k: int,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` entries of highest rank of a matrix, by ascending index; `block(start, stop)` gives
    the entries of its rows from start to stop, of which `best` decides by their `rank`.

    Keeps the best so far and looks, in each block, only at what beats the least of them. Who these
    are is found out when there are twice as many: on a GPU each time waits for all its work.
    """
    indices = torch.empty(0, dtype=torch.int64, device=device)
    values = torch.empty(0, dtype=torch.float32, device=device)
    if k == 0:
        return indices, values
    bound = None  # the least of k
    for start, stop in row_blocks(rows, cols):
        entries = block(start, stop)
        if bound is None:
            where, found = _highest(entries, rank, best, min(k, len(entries)))
        else:
            where, found = _above(entries, rank, bound)
        if start == 0:
            indices, values = where, found
        else:
            indices = torch.cat([indices, where + start * cols])
            values = torch.cat([values, found])
        if len(values) > k and (bound is None or len(values) >= 2 * k or stop == rows):
            kept = best(rank(values), k)
            indices, values, bound = indices[kept], values[kept], None
        if bound is None and len(values) == k and stop < rows:
            bound = rank(values).amin()
    return indices, values
