"""Only the wanted entries of a weight's gradient, on a CPU, by kernels that numba compiles.

Both operands are transposed a slab of tokens at a time into buffers that stay in the cache, where
every entry is a dot product; no transposed copy of an operand ever exists, and one that is itself a
product of others is formed on the way. Each thread takes tokens of its own or, where that many sums
of all entries would be too much memory, rows of its own too. See `spiel.ops.reference` for what is
computed.

All of it is in this one file, by whose date numba knows whether what it compiled is still true.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spiel.ops import blocked
from spiel.ops.product import Operand, Product
from spiel.ops.threads import set_threads, with_prange

#: Tokens of a slab: so few that it stays near, so many that a dot product pays for its last sum; a
#: multiple of LANES.
SLAB = 48

#: fp32 values in the widest registers, in which products are summed; rows and columns of a tile
#: that is transposed in them.
LANES = 16 if binding.get_host_cpu_features().get("avx512f") else 8

#: fp32 values in a line of the cache.
_LINE = 16


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


def _vector(size: int) -> Any:
    return ir.VectorType(ir.FloatType(), size)


def _row(context: Any, builder: Any, kind: Any, array: Any, row: Any, column: Any) -> Any:
    """Pointer to the LANES values from `column` on in a row of a C-contiguous fp32 array."""
    view = context.make_array(kind)(context, builder, array)
    pointer = cgutils.get_item_pointer(context, builder, kind, view, [row, column])
    return builder.bitcast(pointer, _vector(LANES).as_pointer())


#: Kinds of operands, each a tuple of its kind and three arrays [tokens, n], [tokens, 1] or [1, n]:
#: values as they stand; a product of two for each entry; or values, each times a factor of its
#: token, and that times one of its column. See `_value`.
_PLAIN, _ENTRIES, _SCALED = range(3)
_KINDS = {("entries",): _ENTRIES, ("tokens", "columns"): _SCALED}


def _transpose_tile(kind: int) -> Any:
    """Makes an intrinsic: target[m : m + LANES, s : s + LANES] = x[t : t + LANES, n : n + LANES].T
    for an operand x of that kind: see `_value`, which gives a single entry of it.

    All are C-contiguous fp32 arrays with two dimensions; nothing checks the bounds. In a loop over
    scalars LLVM moves one value at a time, at a third of the speed.
    """

    @intrinsic
    def transpose_tile(typing_context, one, other, columns, t, n, target, m, s):  # type: ignore[no-untyped-def]
        at = types.intp
        signature = types.void(one, other, columns, at, at, target, at, at)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            arrays, (t, n, to_array, m, s) = arguments[:3], arguments[3:]

            def load(i: int, row: Any, column: Any) -> Any:
                array_type = (one, other, columns)[i]
                pointer = _row(context, builder, array_type, arrays[i], row, column)
                return builder.load(pointer, align=4)

            zero = ir.Constant(t.type, 0)
            scales = load(2, zero, n) if kind == _SCALED else None

            def row(t: Any) -> Any:
                values = load(0, t, n)
                if kind == _PLAIN:
                    return values
                if kind == _ENTRIES:
                    return builder.fmul(values, load(1, t, n))
                view = context.make_array(other)(context, builder, arrays[1])
                place = cgutils.get_item_pointer(context, builder, other, view, [t, zero])
                scale = _splat(builder, builder.load(place))
                return builder.fmul(builder.fmul(values, scale), scales)

            rows = [row(_plus(builder, t, i)) for i in range(LANES)]
            for i, vector in enumerate(_transposed(builder, rows)):
                pointer = _row(context, builder, target, to_array, _plus(builder, m, i), s)
                builder.store(vector, pointer, align=4)
            return context.get_dummy_value()

        return signature, generate

    return transpose_tile


_transpose_plain, _transpose_entries, _transpose_scaled = map(
    _transpose_tile, (_PLAIN, _ENTRIES, _SCALED)
)


@numba.njit(nogil=True, cache=True)
def _value(kind, one, other, columns, t, n):  # type: ignore[no-untyped-def]
    """Entry [t, n] of an operand; `other` and `columns` are looked at if its kind has them."""
    if kind == _ENTRIES:
        return one[t, n] * other[t, n]
    if kind == _SCALED:
        return one[t, n] * other[t, 0] * columns[0, n]
    return one[t, n]


def _splat(builder: Any, value: Any) -> Any:
    vector = ir.Constant(_vector(LANES), ir.Undefined)
    vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), 0))
    return _shuffled(builder, vector, vector, [0] * LANES)


def _plus(builder: Any, number: Any, i: int) -> Any:
    return builder.add(number, ir.Constant(number.type, i))


def _lanes(size: int) -> tuple[list[int], list[int]]:
    """Of a pair of vectors, those of the second counted on from LANES: the lanes that stand where
    `size` is not among the bits of their place, and those that stand `size` after them.
    """
    upper = [i if not i & size else LANES + i - size for i in range(LANES)]
    return upper, [lane + size for lane in upper]


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Exchanges the off-diagonal blocks of size 1, then 2, 4 and so on, of each pair of rows."""
    size = 1
    while size < LANES:
        for i in range(LANES):
            if not i & size:
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (_shuffled(builder, *pair, m) for m in _lanes(size))
        size *= 2
    return rows


def _summed(builder: Any, vectors: list[Any]) -> Any:
    """One vector with the sum of each; there are 1, 2, 4 or 8 of them."""
    size, num = 1, len(vectors)
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [
            builder.fadd(*(_shuffled(builder, *pair, m) for m in _lanes(size))) for pair in pairs
        ]
        size *= 2
    (sums,), width = vectors, LANES
    while width > num:  # each is still in several parts
        width //= 2
        halves = list(range(width)), list(range(width, 2 * width))
        sums = builder.fadd(*(_shuffled(builder, sums, sums, lanes) for lanes in halves))
    return sums


def _shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(one, other, mask)


def _add_dots(num: int) -> Any:
    """Makes an intrinsic: sums[e : e + num] += right_CS[columns[e : e + num]] @ left_RS[row]

    All are C-contiguous, and nothing checks the bounds. In a loop over scalars LLVM adds up the
    lanes of each product on their own.
    """

    @intrinsic
    def add_dots(typing_context, left, row, right, columns, sums, e):  # type: ignore[no-untyped-def]
        signature = types.void(left, types.intp, right, columns, sums, types.intp)

        def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
            left_RS, row, right_CS, column_array, sum_array, e = arguments

            def item(kind: Any, array: Any, i: int) -> Any:
                view = context.make_array(kind)(context, builder, array)
                place = [_plus(builder, e, i)]
                return cgutils.get_item_pointer(context, builder, kind, view, place)

            at = [builder.load(item(columns, column_array, i)) for i in range(num)]
            at = [builder.sext(column, e.type) for column in at]
            totals = [ir.Constant(_vector(LANES), [0.0] * LANES)] * num
            for s in range(0, SLAB, LANES):
                start = ir.Constant(e.type, s)
                pointer = _row(context, builder, left, left_RS, row, start)
                a = builder.load(pointer, align=4)
                for i, column in enumerate(at):
                    pointer = _row(context, builder, right, right_CS, column, start)
                    product = builder.fmul(a, builder.load(pointer, align=4), flags=["contract"])
                    totals[i] = builder.fadd(totals[i], product, flags=["contract"])
            place = builder.bitcast(item(sums, sum_array, 0), _vector(num).as_pointer())
            total = builder.fadd(builder.load(place, align=4), _summed(builder, totals))
            builder.store(total, place, align=4)
            return context.get_dummy_value()

        return signature, generate

    return add_dots


_add_dots_8, _add_dots_4, _add_dots_2, _add_dots_1 = (_add_dots(num) for num in (8, 4, 2, 1))


@numba.njit(nogil=True, cache=True)
def _transpose(operand, start, stop, first, last, out_NS):  # type: ignore[no-untyped-def]
    """Tokens start to stop of the columns first to last of an operand, transposed, in the first
    columns of `out`, whose other columns become 0.
    """
    kind, one, other, columns = operand
    width, length = last - first, stop - start
    # As many tiles below each other as fill a line of the cache.
    wide, tall = width // LANES * LANES, length // _LINE * _LINE
    for top in range(0, tall, _LINE):
        for left in range(0, wide, LANES):
            for part in range(top, top + _LINE, LANES):
                t, n = start + part, first + left
                if kind == _ENTRIES:
                    _transpose_entries(one, other, columns, t, n, out_NS, left, part)
                elif kind == _SCALED:
                    _transpose_scaled(one, other, columns, t, n, out_NS, left, part)
                else:
                    _transpose_plain(one, other, columns, t, n, out_NS, left, part)
    for s in range(length):
        for n in range(wide if s < tall else 0, width):
            out_NS[n, s] = _value(kind, one, other, columns, start + s, first + n)
    out_NS[:width, length:] = 0


@numba.njit(nogil=True, cache=True)
def _add_products(left_RS, right_CS, pointers, columns, sums):  # type: ignore[no-untyped-def]
    """Adds to `sums` [k] the dot products of the entries' rows and columns."""
    for row in range(len(pointers) - 1):
        e, end = pointers[row], pointers[row + 1]
        while e + 8 <= end:
            _add_dots_8(left_RS, row, right_CS, columns, sums, e)
            e += 8
        if e + 4 <= end:
            _add_dots_4(left_RS, row, right_CS, columns, sums, e)
            e += 4
        if e + 2 <= end:
            _add_dots_2(left_RS, row, right_CS, columns, sums, e)
            e += 2
        if e < end:
            _add_dots_1(left_RS, row, right_CS, columns, sums, e)


@numba.njit(nogil=True, cache=True)
def _even_rows(pointers, num_groups):  # type: ignore[no-untyped-def]
    """First rows [groups + 1] of groups with about as many entries of all supports each; `pointers`
    [supports, rows + 1].
    """
    before = pointers.sum(axis=0)
    edges = np.zeros(num_groups + 1, np.int64)
    for group in range(1, num_groups):
        edges[group] = np.searchsorted(before, before[-1] * group // num_groups)
    edges[num_groups] = len(before) - 1
    return edges


@with_prange
def _products(left, right, indices, bounds, values, num_threads, num_shares, out):  # type: ignore[no-untyped-def]
    """Puts into `out` [k] the entries of left.T @ right at `indices` [k]: several supports in a
    row, the s-th of them from bounds[s] to bounds[s + 1].

    Tokens are divided into `num_shares`, and the rows among the threads that have one share in
    common. `values` is workspace, of at least (rows + cols) * SLAB for each thread.
    """
    (tokens, rows), cols = left[1].shape, right[1].shape[1]
    num_groups = num_threads // num_shares
    size = num_threads * (rows + cols) * SLAB
    slabs = values[:size].reshape((num_threads, rows + cols, SLAB))
    num_supports = len(bounds) - 1
    pointers = np.zeros((num_supports, rows + 1), np.int64)
    columns = np.empty(len(indices), np.int32)
    for s in range(num_supports):
        own = slice(bounds[s], bounds[s + 1])
        _positions(indices[own], cols, pointers[s], columns[own])
    length = (tokens + num_shares - 1) // num_shares
    edges = _even_rows(pointers, num_groups)
    sums = np.zeros((num_shares, len(indices)), np.float32)
    for thread in numba.prange(num_shares * num_groups):
        share, group = thread // num_groups, thread % num_groups
        first, last = edges[group], edges[group + 1]
        left_RS, right_CS = slabs[thread, :rows], slabs[thread, rows:]
        end = min(tokens, (share + 1) * length) if last > first else 0
        for start in range(share * length, end, SLAB):
            stop = min(start + SLAB, end)
            _transpose(left, start, stop, first, last, left_RS)
            _transpose(right, start, stop, 0, cols, right_CS)
            for s in range(num_supports):
                lo, hi = bounds[s], bounds[s + 1]
                here = pointers[s, first : last + 1]
                _add_products(left_RS, right_CS, here, columns[lo:hi], sums[share, lo:hi])
    out[:] = sums[0]
    for share in range(1, num_shares):
        out += sums[share]


class SampledEntries:
    """What `sampled_gradients` asks of some supports, each [k], found once for many calls."""

    def __init__(self, *supports: torch.Tensor) -> None:
        indices = supports[0] if len(supports) == 1 else torch.cat(supports)
        self._indices = indices.contiguous().numpy()
        self._sizes = [len(support) for support in supports]
        self._bounds = np.array([0, *accumulate(self._sizes)])
        self._num_threads = self._num_shares = 0

    def __call__(self, left_TR: torch.Tensor, right_TC: Operand) -> list[torch.Tensor]:
        num_threads = set_threads()
        if num_threads != self._num_threads:
            self._num_threads = num_threads
            self._num_shares = _num_shares(num_threads, len(self._indices))
        left, right = _arrays(left_TR), _arrays(right_TC)
        workspace = _workspace(num_threads * (left_TR.shape[1] + right_TC.shape[1]) * SLAB)
        entries = torch.empty(len(self._indices), dtype=torch.float32, device="cpu")
        division = self._bounds, workspace, num_threads, self._num_shares
        _products(left, right, self._indices, *division, entries.numpy())
        if len(self._sizes) == 1:
            return [entries]
        # Each support's in memory of its own: the gradient of the deltas outlives the candidates'.
        return [own.clone() for own in entries.split(self._sizes)]


def _arrays(operand: Operand) -> tuple[Any, ...]:
    """The operand's kind, and the three arrays that `_value` takes for it."""
    if isinstance(operand, Product):
        kind, factors = _KINDS.get(operand.kinds), (operand.one, *operand.others)
        if kind is not None and all(map(_is_array, factors)):
            arrays = [factor.numpy() for factor in factors]
            return kind, *arrays[:2], arrays[-1]
        operand = operand.form()
    if operand.requires_grad:
        operand = operand.detach()
    if not _is_array(operand):
        operand = operand.float().contiguous()
    array: np.ndarray = operand.numpy()
    return _PLAIN, array, array, array


def _is_array(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.is_contiguous()


def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32."""
    return SampledEntries(*supports)(left_TR, right_TC)


def _num_shares(num_threads: int, k: int) -> int:
    """Into how many shares to divide tokens, each of which has fp32 sums of its own for all `k`
    entries: as many as there are threads, if they fit the workspace.
    """
    fitting = max(1, blocked.WORKSPACE_BYTES // (4 * max(1, k)))
    return max(n for n in range(1, num_threads + 1) if num_threads % n == 0 and n <= fitting)


class _Kept(threading.local):
    """What outlives a call: memory fresh from the system costs more than the product does."""

    values = np.empty(0, np.float32)


_kept = _Kept()


def _workspace(size: int) -> np.ndarray:
    """At least so many values, of which the first begins a line of the cache."""
    if len(_kept.values) < size:
        values = np.empty(size + _LINE, np.float32)
        _kept.values = values[-(values.ctypes.data // 4) % _LINE :]
    return _kept.values
