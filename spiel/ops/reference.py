"""The definition of every op, dense and slow. The faster ones are tested against it.

A linear layer with weight [rows, cols] has the gradient dW = left.T @ right, where for
`torch.nn.Linear` `left` is the gradient of the output and `right` the input. T counts tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from spiel.ops.autocast import without_autocast

#: Of left [tokens, rows], right [tokens, cols] and supports, each [k]: for each support [k] values.
SampledGradients = Callable[
    [torch.Tensor, torch.Tensor, Sequence[torch.Tensor]], list[torch.Tensor]
]


@without_autocast
def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32."""
    dense_RC = left_TR.float().t() @ right_TC.float()
    return [dense_RC.reshape(-1)[indices.long()] for indices in supports]


@without_autocast
def largest_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The support of the `k` largest |entries| of left.T @ right, and those entries in fp32."""
    dense = (left_TR.float().t() @ right_TC.float()).reshape(-1)
    indices = dense.abs().topk(k).indices.sort().values
    return indices, dense[indices]


def largest_products(
    row: torch.Tensor, col: torch.Tensor, k: int, exclude: torch.Tensor
) -> torch.Tensor:
    """The support of the `k` largest row x col products outside `exclude`."""
    products = torch.outer(row, col).reshape(-1)
    products[exclude.long()] = -1
    return products.topk(k).indices.sort().values
