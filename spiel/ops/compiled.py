"""Only the wanted entries of a weight, on a CPU, by kernels that numba compiles.

For the gradient both operands are transposed a slab of tokens at a time into buffers that stay in
the cache, where every entry is a dot product; no transposed copy of an operand ever exists. Each
thread takes tokens of its own. See `spiel.ops.reference` for what is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise

import numba
import numpy as np
import torch

#: Tokens of a slab: multiples of a vector register's width.
MAX_SLAB, MIN_SLAB = 128, 16
#: What the two transposed slabs of a thread may take, of the last level of cache.
SLAB_BYTES = 2**22

#: Sums may be reordered and fused; unlike full "fast math" this keeps NaN and infinity.
_REORDERED = {"reassoc", "contract", "nsz"}

#: Rows and columns that are transposed together: fp32 values in a vector register.
_TILE = 8


@numba.njit(nogil=True, cache=True)
def _positions(indices, cols, pointers, columns):  # type: ignore[no-untyped-def]
    """Row pointers [rows + 1] and columns [k] of sorted flat indices [k]."""
    row = 0
    for e in range(len(indices)):
        while indices[e] >= (row + 1) * cols:
            row += 1
            pointers[row] = e
        columns[e] = indices[e] - row * cols
    pointers[row + 1 :] = len(indices)


@numba.njit(nogil=True, cache=True)
def _transpose(x_TN, start, stop, out_NS):  # type: ignore[no-untyped-def]
    """Tokens start to stop of x as columns of `out`, whose other columns become 0."""
    width = x_TN.shape[1]
    for top in range(start, stop, _TILE):
        for left in range(0, width, _TILE):
            if top + _TILE <= stop and left + _TILE <= width:
                for t in range(_TILE):  # of constant lengths, so that it is done in registers
                    for n in range(_TILE):
                        out_NS[left + n, top - start + t] = x_TN[top + t, left + n]
            else:
                for t in range(top, min(top + _TILE, stop)):
                    for n in range(left, min(left + _TILE, width)):
                        out_NS[n, t - start] = x_TN[t, n]
    out_NS[:, stop - start :] = 0


@numba.njit(nogil=True, cache=True, fastmath=_REORDERED)
def _add_products(left_RS, right_CS, pointers, columns, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` [k] the dot products of the entries' rows and columns, four at a time."""
    width = left_RS.shape[1]
    for row in range(len(pointers) - 1):
        e, end = pointers[row], pointers[row + 1]
        a = left_RS[row]
        while e + 4 <= end:
            b0, b1 = right_CS[columns[e]], right_CS[columns[e + 1]]
            b2, b3 = right_CS[columns[e + 2]], right_CS[columns[e + 3]]
            s0 = s1 = s2 = s3 = np.float32(0)
            for t in range(width):
                s0 += a[t] * b0[t]
                s1 += a[t] * b1[t]
                s2 += a[t] * b2[t]
                s3 += a[t] * b3[t]
            sums[e] += s0
            sums[e + 1] += s1
            sums[e + 2] += s2
            sums[e + 3] += s3
            e += 4
        while e < end:
            b0 = right_CS[columns[e]]
            s0 = np.float32(0)
            for t in range(width):
                s0 += a[t] * b0[t]
            sums[e] += s0
            e += 1


@numba.njit(nogil=True, cache=True, parallel=True)
def _products(left_TR, right_TC, indices, bounds, slabs):  # type: ignore[no-untyped-def]
    """Each thread's share [threads, k] of the entries of left.T @ right at `indices` [k]: several
    supports in a row, the s-th of them from bounds[s] to bounds[s + 1].

    `slabs` [threads, rows + cols, tokens of a slab] is workspace.
    """
    tokens, rows, cols = left_TR.shape[0], left_TR.shape[1], right_TC.shape[1]
    num_threads, _, slab = slabs.shape
    num_supports = len(bounds) - 1
    pointers = np.zeros((num_supports, rows + 1), np.int64)
    columns = np.empty(len(indices), np.int32)
    for s in range(num_supports):
        own = slice(bounds[s], bounds[s + 1])
        _positions(indices[own], cols, pointers[s], columns[own])
    share = (tokens + num_threads - 1) // num_threads
    sums = np.zeros((num_threads, len(indices)), np.float32)
    for thread in numba.prange(num_threads):
        left_RS, right_CS = slabs[thread, :rows], slabs[thread, rows:]
        end = min(tokens, (thread + 1) * share)
        for start in range(thread * share, end, slab):
            stop = min(start + slab, end)
            _transpose(left_TR, start, stop, left_RS)
            _transpose(right_TC, start, stop, right_CS)
            for s in range(num_supports):
                lo, hi = bounds[s], bounds[s + 1]
                _add_products(left_RS, right_CS, pointers[s], columns[lo:hi], sums[thread, lo:hi])
    return sums


def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32."""
    bounds = np.cumsum([0, *(len(support) for support in supports)])
    indices = supports[0] if len(supports) == 1 else torch.cat(list(supports))
    num_threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(num_threads)
    sums = _products(
        left_TR.detach().float().contiguous().numpy(),
        right_TC.detach().float().contiguous().numpy(),
        indices.contiguous().numpy(),
        bounds,
        _workspace(num_threads, left_TR.shape[1] + right_TC.shape[1]),
    )
    # Each support's in memory of its own: the gradient of the deltas outlives the candidates'.
    return [torch.from_numpy(sums[:, lo:hi].sum(0)) for lo, hi in pairwise(bounds)]


@numba.njit(nogil=True, cache=True)
def _write_sums(weight, indices, originals, deltas):  # type: ignore[no-untyped-def]
    for e in range(len(indices)):
        weight[indices[e]] = originals[e] + deltas[e]


def write_entries(
    weight: torch.Tensor, indices: torch.Tensor, originals: torch.Tensor, deltas: torch.Tensor
) -> None:
    """weight[indices] = originals + deltas, all [k] and fp32, in one pass.

    Args:
        weight: [rows, cols], fp32, contiguous, on a CPU. Autograd does not see it change.
    """
    tensors = (weight.view(-1), indices, originals, deltas)
    _write_sums(*(tensor.detach().numpy() for tensor in tensors))


class _Kept(threading.local):
    """A buffer that outlives a call: memory fresh from the system costs more than the product."""

    values = np.empty(0, np.float32)


_kept = _Kept()


def _workspace(num_threads: int, width: int) -> np.ndarray:
    """[threads, width, tokens of a slab]"""
    slab = _slab(width)
    size = num_threads * width * slab
    if len(_kept.values) < size:
        _kept.values = np.empty(size, np.float32)
    return _kept.values[:size].reshape(num_threads, width, slab)


def _slab(width: int) -> int:
    """How many tokens of `width` rows and columns fit a thread's cache."""
    fitting = SLAB_BYTES // (4 * width) // MIN_SLAB * MIN_SLAB
    return max(MIN_SLAB, min(MAX_SLAB, fitting))
