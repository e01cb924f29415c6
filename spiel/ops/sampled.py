"""Only the wanted entries of a weight's gradient, by a library's sampled dense-dense product.

See `spiel.ops.reference` for what is computed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spiel.ops.autocast import without_autocast
from spiel.ops.transposed import last_left, last_right
from spiel.support import row_pointers, split_index

with warnings.catch_warnings():
    # torch says once in a process that CSR tensors are in beta; no user of SpIEL can act on it.
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


@without_autocast
def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32."""
    left_RT, right_CT = last_left(left_TR, torch.float32), last_right(right_TC, torch.float32)
    shape = len(left_RT), len(right_CT)
    patterns = (_pattern(indices, *shape) for indices in supports)
    return [
        torch.sparse.sampled_addmm(pattern, left_RT, right_CT.t(), beta=0.0).values()
        for pattern in patterns
    ]


def _pattern(indices: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    """The support as a sparse matrix of zeros."""
    return torch.sparse_csr_tensor(
        row_pointers(indices, rows, cols),
        split_index(indices, cols)[1],
        torch.zeros(len(indices), dtype=torch.float32, device=indices.device),
        size=(rows, cols),
        check_invariants=False,
    )
