"""Only the wanted entries of a weight's gradient, by a library's sampled dense-dense product.

See `spiel.ops.reference` for what is computed.
"""

from __future__ import annotations

import warnings

import torch

from spiel.support import row_pointers, split_index

with warnings.catch_warnings():
    # torch says once in a process that CSR tensors are in beta; no user of SpIEL can act on it.
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


class LastTransposed:
    """The transposed copy of the operand asked for last.

    The product wants both operands contiguous along tokens. Modules that share an input (query,
    key and value; gate and up) ask for its copy one after the other, and so does a growth window.
    Holds that operand and its copy until another is asked for, or `forget`.
    """

    def __init__(self) -> None:
        self._slot: tuple[torch.Tensor, int, torch.Tensor] | None = None

    def __call__(self, operand_TN: torch.Tensor) -> torch.Tensor:
        """The copy [N, T], contiguous, in fp32."""
        slot = self._slot
        if slot is not None and _is_same(slot[0], operand_TN) and slot[1] == operand_TN._version:
            return slot[2]
        copy_NT = operand_TN.t().to(torch.float32, memory_format=torch.contiguous_format)
        copy_NT = copy_NT.contiguous()
        self._slot = (operand_TN, operand_TN._version, copy_NT)
        return copy_NT

    def forget(self) -> None:
        self._slot = None


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors, both alive, are the same view of the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.dtype == other.dtype
    )


_last_left, _last_right = LastTransposed(), LastTransposed()


def sampled_gradient(
    left_TR: torch.Tensor, right_TC: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """The entries `indices` [k] of left.T @ right, in fp32."""
    rows, cols = left_TR.shape[1], right_TC.shape[1]
    pattern = torch.sparse_csr_tensor(
        row_pointers(indices, rows, cols),
        split_index(indices, cols)[1],
        torch.zeros(len(indices), dtype=torch.float32, device=indices.device),
        size=(rows, cols),
        check_invariants=False,
    )
    left_RT, right_CT = _last_left(left_TR), _last_right(right_TC)
    return torch.sparse.sampled_addmm(pattern, left_RT, right_CT.t(), beta=0.0).values()


def forget_operands() -> None:
    """Lets go of the operands kept for the next call; for the end of a backward pass."""
    _last_left.forget()
    _last_right.forget()
