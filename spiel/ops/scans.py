"""What takes torch several passes over an array, in one, on a CPU; numba compiles it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from spiel.ops.threads import set_threads, with_prange

#: All bits of an fp32 number but its sign: read as an integer, it grows with the magnitude.
_MAGNITUDE = np.int32(0x7FFFFFFF)

#: So many entries are looked at together, and one by one only if one of them passes.
_RUN = 8


@with_prange
def _write_sums(weight, indices, originals, deltas):  # type: ignore[no-untyped-def]
    for e in numba.prange(len(indices)):
        weight[indices[e]] = originals[e] + deltas[e]


def write_entries(
    weight: torch.Tensor, indices: torch.Tensor, originals: torch.Tensor, deltas: torch.Tensor
) -> None:
    """weight[indices] = originals + deltas, all [k] and fp32, in one pass.

    Args:
        weight: [rows, cols], fp32, contiguous, on a CPU. Autograd does not see it change.
    """
    set_threads()
    tensors = (weight.view(-1), indices, originals, deltas)
    _write_sums(*(tensor.detach().numpy() for tensor in tensors))


@intrinsic
def _pointer(typing_context, address):  # type: ignore[no-untyped-def]
    """An address as what `numba.carray` makes an array of."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@numba.njit(nogil=True, cache=True)
def _fp32(address, size):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address), (size,), np.float32)  # type: ignore[call-arg]


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _adamw_part(own, first, last, num_ages, table, beta1, part1, beta2, part2, eps, lr, kept):  # type: ignore[no-untyped-def]
    """The entries from first to last of one parameter: see `_adamw`."""
    values, gradient = _fp32(own[0], last), _fp32(own[1], last)
    m, v = _fp32(own[2], last), _fp32(own[3], last)
    ages = numba.carray(_pointer(own[4]), (num_ages,), np.int16)  # type: ignore[call-arg]
    stride = 1 if num_ages > 1 else 0
    for e in range(first, last):
        g = gradient[e]
        m[e] = beta1 * m[e] + part1 * g
        v[e] = beta2 * v[e] + part2 * g * g
        step = m[e] / (np.sqrt(v[e]) + eps) * table[ages[e * stride]]
        values[e] = (values[e] - lr * step) * kept


@with_prange
def _adamw(addresses, sizes, num_threads, table, beta1, part1, beta2, part2, eps, lr, kept):  # type: ignore[no-untyped-def]
    """`addresses` [n, 5] are those of values, gradient, m, v and ages; `sizes` [n, 2] how many
    entries and ages there are. Each thread takes as many entries, one after the other.
    """
    total = sizes[:, 0].sum()
    for thread in numba.prange(num_threads):
        first, last = total * thread // num_threads, total * (thread + 1) // num_threads
        for i in range(len(sizes)):
            size, num_ages = sizes[i]
            if first < size and last > 0:
                own = max(first, 0), min(last, size), num_ages
                _adamw_part(addresses[i], *own, table, beta1, part1, beta2, part2, eps, lr, kept)
            first, last = first - size, last - size


def adamw(
    values: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    m: Sequence[torch.Tensor],
    v: Sequence[torch.Tensor],
    ages: Sequence[torch.Tensor],
    table: torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
) -> None:
    """A step of `spiel.SpielAdamW` for all parameters, which changes `values`, `m` and `v`, in one
    pass and one call: of many small ones each would cost more than its entries do.

    Args:
        values: fp32 and contiguous, as are `m` and `v` of as many entries.
        gradients: fp32, of as many entries.
        ages: int16, for each parameter one for each entry or for all.
        table: fp32; what each age multiplies its step by.

    Raises:
        ValueError: a tensor is of another dtype, size or layout. Nothing was changed.
    """
    num_threads = set_threads()
    gradients = [gradient.contiguous() for gradient in gradients]
    ages = [age.contiguous() for age in ages]
    tensors = list(zip(values, gradients, m, v, ages, strict=True))
    for own in tensors:
        _check_adamw(*own)
    addresses = np.array([[tensor.data_ptr() for tensor in own] for own in tensors])
    sizes = np.array([(own[0].numel(), own[-1].numel()) for own in tensors])
    beta1, beta2 = betas
    numbers = beta1, 1 - beta1, beta2, 1 - beta2, eps, lr, 1 - lr * weight_decay
    _adamw(addresses, sizes, num_threads, table.numpy(), *map(np.float32, numbers))


def _check_adamw(values: torch.Tensor, *others: torch.Tensor) -> None:
    """Raises ValueError unless these are what `adamw` may read and write by their addresses."""
    *moments, ages = others
    for each in (values, *moments):
        is_alike = each.dtype == torch.float32 and each.numel() == values.numel()
        if not (is_alike and each.is_contiguous()):
            raise ValueError(
                f"expected {values.numel()} contiguous entries in fp32, got {each.numel()} in "
                f"{each.dtype} with strides {each.stride()}"
            )
    if ages.dtype != torch.int16 or ages.numel() not in (1, values.numel()):
        raise ValueError(
            f"expected 1 or {values.numel()} ages in int16, got {ages.numel()} in {ages.dtype}"
        )


@numba.njit(nogil=True, cache=True)
def _raise_sm3(indices, gradient, row, col, u):  # type: ignore[no-untyped-def]
    """Fills `u` by the accumulators as they were, and raises them to it."""
    before_row, before_col = row.copy(), col.copy()
    cols = len(col)
    i = 0
    for e in range(len(indices)):
        while indices[e] >= (i + 1) * cols:
            i += 1
        j = indices[e] - i * cols
        u[e] = np.minimum(before_row[i], before_col[j]) + gradient[e] * gradient[e]
        row[i], col[j] = np.maximum(row[i], u[e]), np.maximum(col[j], u[e])  # NaN propagates


def raise_sm3(
    indices: torch.Tensor, gradient: torch.Tensor, row: torch.Tensor, col: torch.Tensor
) -> torch.Tensor:
    """u [k] of `spiel.SpielSM3` for entries at the support `indices` [k] of a weight with the
    accumulators `row` [rows] and `col` [cols], which it raises; all but the support in fp32.
    """
    u = torch.empty_like(gradient)
    tensors = (indices, gradient.contiguous(), row, col, u)
    _raise_sm3(*(tensor.numpy() for tensor in tensors))
    return u


@numba.njit(nogil=True, cache=True)
def _collect(values, bits, bound, offset, places, found):  # type: ignore[no-untyped-def]
    """Writes down what is above the bound, with `offset` added to its place; returns how many."""
    # Unsigned numbers as indices: numba would look whether others are negative, at each access.
    n, run = np.uint64(0), np.uint64(_RUN)
    whole = np.uint64(len(bits)) // run * run
    for start in range(np.uint64(0), whole, run):
        least = np.int32(0)
        for e in range(start, start + run):
            least |= bound - (bits[e] & _MAGNITUDE)  # negative if one of them is
        if least < 0:
            for e in range(start, start + run):
                places[n], found[n] = np.int64(e) + offset, values[e]
                n += np.uint64((bits[e] & _MAGNITUDE) > bound)
    for e in range(whole, np.uint64(len(bits))):
        places[n], found[n] = np.int64(e) + offset, values[e]
        n += np.uint64((bits[e] & _MAGNITUDE) > bound)
    return n


@with_prange
def _above(values, bits, bound, num_threads, places, found, counts):  # type: ignore[no-untyped-def]
    """Each thread fills `places` and `found` from where its part of `values` begins, and says how
    many there are.
    """
    size = (len(bits) + num_threads - 1) // num_threads
    for thread in numba.prange(num_threads):
        first = min(len(bits), thread * size)
        own = slice(first, min(len(bits), first + size))
        counts[thread] = _collect(
            values[own], bits[own], bound, first, places[first:], found[first:]
        )


def above(values: torch.Tensor, bound: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending places, in int64, of the fp32 `values` [n] whose magnitude is above `bound`, which
    is not negative, or that are NaN; and those values. All of them, where the bound is NaN.
    """
    num_threads = set_threads()
    # An entry is written before it is known whether it counts: the last may be one too far.
    places, found = np.empty(len(values) + 1, np.int64), np.empty(len(values) + 1, np.float32)
    counts = np.empty(num_threads, np.int64)
    array = values.detach().numpy()
    bits = array.view(np.int32)
    bound_bits = np.int32(-1) if np.isnan(bound) else np.float32(bound).view(np.int32)
    arguments = (array, bits, bound_bits, num_threads, places, found, counts)
    _above(*arguments)
    size = -(-len(values) // num_threads)
    parts = [slice(i * size, i * size + count) for i, count in enumerate(counts)]
    joined = (np.concatenate([each[part] for part in parts]) for each in (places, found))
    some_places, some_values = (torch.from_numpy(each) for each in joined)
    return some_places, some_values


@numba.njit(nogil=True, cache=True)
def _find(indices, queries, slots, is_found):  # type: ignore[no-untyped-def]
    """Both are sorted: every step goes on in one of them, and takes no branch."""
    slot = query = 0
    while query < len(queries):
        is_below = slot < len(indices) - 1 and indices[slot] < queries[query]
        slots[query] = slot
        is_found[query] = indices[slot] == queries[query]
        slot += is_below
        query += not is_below


def find(indices: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `spiel.support.find`, for `queries` [n] that are sorted, of the same dtype."""
    slots, is_found = np.empty(len(queries), np.int64), np.empty(len(queries), np.bool_)
    arrays = (indices.numpy(), queries.numpy(), slots, is_found)
    _find(*arrays)
    return torch.from_numpy(slots), torch.from_numpy(is_found)


@numba.njit(nogil=True, cache=True)
def _exchange(indices, slots, entering, changed, source, grown):  # type: ignore[no-untyped-def]
    place = gone = new = 0
    for slot in range(len(indices) + 1):
        while new < len(entering) and (slot == len(indices) or entering[new] < indices[slot]):
            changed[place], source[place], grown[new] = entering[new], slots[new], place
            new, place = new + 1, place + 1
        if gone < len(slots) and slots[gone] == slot:
            gone += 1
        elif slot < len(indices):
            changed[place], source[place] = indices[slot], slot
            place += 1


def exchange(
    indices: torch.Tensor, slots: torch.Tensor, entering: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `spiel.reselection.exchange`: the fields of an Exchange."""
    changed = torch.empty_like(indices)
    source = torch.empty(len(indices), dtype=torch.int64, device="cpu")
    grown = torch.empty_like(slots)
    tensors = (indices, slots, entering, changed, source, grown)
    _exchange(*(tensor.numpy() for tensor in tensors))
    return changed, source, grown


def settle() -> None:
    """Has all that steps and reselections use compiled now, for int32 supports."""
    some, all_of_it = torch.arange(2, dtype=torch.int32), torch.arange(2)
    values = torch.ones(2)
    one, ages = [values], [some.short()]
    adamw(one, one, one, one, ages, values, (0.9, 0.99), 1e-8, 1e-3, 0.0)
    raise_sm3(some, *[values] * 3)
    above(values, 1.0)
    find(some, some)
    exchange(some, all_of_it, some)
