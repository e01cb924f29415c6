"""Only the wanted entries of a weight's gradient, by a library's sampled dense-dense product.

See `spiel.ops.reference` for what is computed.
"""

from __future__ import annotations

import warnings

import torch

from spiel.ops.transposed import last_left, last_right
from spiel.support import row_pointers, split_index

with warnings.catch_warnings():
    # torch says once in a process that CSR tensors are in beta; no user of SpIEL can act on it.
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


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
    left_RT, right_CT = last_left(left_TR, torch.float32), last_right(right_TC, torch.float32)
    return torch.sparse.sampled_addmm(pattern, left_RT, right_CT.t(), beta=0.0).values()
