"""Operands contiguous along tokens, copied once for all who ask for the same one in a row."""

from __future__ import annotations

from collections.abc import Callable

import torch

#: Makes a copy [N, T] of an operand [T, N] in a dtype; see `transposed`.
Transpose = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


def transposed(operand_TN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The copy [N, T], contiguous, in `dtype`."""
    return operand_TN.t().to(dtype, memory_format=torch.contiguous_format).contiguous()


class LastTransposed:
    """The transposed copy of the operand asked for last.

    The product wants both operands contiguous along tokens. Modules that share an input (query,
    key and value; gate and up) ask for its copy one after the other. Holds that operand and its
    copy until another is asked for, or `forget`.
    """

    def __init__(self) -> None:
        #: The operand, its copy, and how that was made. One object, so that threads (a backward
        #: pass has one for each GPU) never see half a change.
        self._kept: tuple[torch.Tensor, torch.Tensor, tuple[int, torch.dtype, Transpose]] | None
        self._kept = None

    def __call__(
        self, operand_TN: torch.Tensor, dtype: torch.dtype, transpose: Transpose = transposed
    ) -> torch.Tensor:
        """What `transpose` gives, now or when it was last asked for the same."""
        made = (operand_TN._version, dtype, transpose)
        kept = self._kept
        if kept is not None and kept[2] == made and _is_same(kept[0], operand_TN):
            return kept[1]
        kept = self._kept = None  # before the next copy is made, not beside it
        copy = transpose(operand_TN, dtype)
        self._kept = operand_TN, copy, made
        return copy

    def forget(self) -> None:
        self._kept = None


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, both alive, are the same view of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


#: One for each side of the product, whichever backend forms it.
last_left, last_right = LastTransposed(), LastTransposed()


def forget_operands() -> None:
    """Lets go of the operands kept for the next call; for the end of a backward pass."""
    last_left.forget()
    last_right.forget()
