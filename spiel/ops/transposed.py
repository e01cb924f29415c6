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
        self._operand: torch.Tensor | None = None
        self._copy: torch.Tensor | None = None
        self._made: tuple[int, torch.dtype, Transpose] | None = None

    def __call__(
        self, operand_TN: torch.Tensor, dtype: torch.dtype, transpose: Transpose = transposed
    ) -> torch.Tensor:
        """What `transpose` gives, now or when it was last asked for the same."""
        made = (operand_TN._version, dtype, transpose)
        if self._copy is None or self._made != made or not _is_same(self._operand, operand_TN):
            self.forget()  # before the next copy is made, not beside it
            self._copy = transpose(operand_TN, dtype)
            self._operand, self._made = operand_TN, made
        return self._copy

    def forget(self) -> None:
        self._operand = self._copy = self._made = None


def _is_same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    """Whether two tensors, both alive, are the same view of the same memory."""
    return (
        one is not None
        and one.data_ptr() == other.data_ptr()
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
