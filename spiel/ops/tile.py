"""One tile of a matrix transposed in vector registers, for the kernels that numba compiles.

LLVM does not find this in a loop over scalars, which moves one value at a time: at a third of the
speed. The vectors are LLVM's own, so any CPU runs this, in registers of whatever width it has.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

#: Rows and columns of a tile: fp32 values in a 256-bit register.
TILE = 8


@intrinsic
def transpose_tile(typing_context, source, t, n, target, m, s):  # type: ignore[no-untyped-def]
    """target[m : m + TILE, s : s + TILE] = source[t : t + TILE, n : n + TILE].T

    Both are C-contiguous fp32 arrays with two dimensions; nothing checks the bounds.
    """
    signature = types.void(source, types.intp, types.intp, target, types.intp, types.intp)

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        from_array, t, n, to_array, m, s = arguments

        def row(kind: Any, array: Any, first: Any, i: int, column: Any) -> Any:
            """Where the tile's row `i` begins, as a pointer to a vector."""
            view = context.make_array(kind)(context, builder, array)
            index = [builder.add(first, ir.Constant(first.type, i)), column]
            pointer = cgutils.get_item_pointer(context, builder, kind, view, index)
            return builder.bitcast(pointer, ir.VectorType(ir.FloatType(), TILE).as_pointer())

        rows = [builder.load(row(source, from_array, t, i, n), align=4) for i in range(TILE)]
        for i, vector in enumerate(_transposed(builder, rows)):
            builder.store(vector, row(target, to_array, m, i, s), align=4)
        return context.get_dummy_value()

    return signature, generate


def _transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """Exchanges the off-diagonal blocks of size 1, then 2, then 4, of each pair of rows."""
    for size in (1, 2, 4):
        # Lanes of a pair of rows, those of the second counted on from TILE.
        upper = [i if not i & size else TILE + i - size for i in range(TILE)]
        lower = [lane + size for lane in upper]
        for i in range(TILE):
            if not i & size:
                pair = rows[i], rows[i + size]
                rows[i], rows[i + size] = (_shuffled(builder, *pair, m) for m in (upper, lower))
    return rows


def _shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    mask = ir.Constant(ir.VectorType(ir.IntType(32), TILE), lanes)
    return builder.shuffle_vector(one, other, mask)
