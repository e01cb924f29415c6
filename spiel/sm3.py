"""SpielSM3: the memory-efficient optimiser whose accumulators also tell MA where to grow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from spiel.delta_layer import DeltaLayer, layer_of
from spiel.ops import optional
from spiel.optimizer import SpielOptimizer
from spiel.reselection import Exchange
from spiel.support import split_index


class SpielSM3(SpielOptimizer):
    """SM3 (arXiv 1901.11150) on the active weights, with one accumulator per row and per column.

    For an active weight at (i, j) with gradient g:
        u = min(row[i], col[j]) + g^2,   value -= lr g / sqrt(u + eps)
    and afterwards row[i] and col[j] rise to the largest u of their active weights. Parameters that
    are not deltas get the same cover of rows and columns if they are matrices, else one
    accumulator per entry.

    State: 4 bytes for each row and column of a weight; 4 bytes per active weight with momentum.

    Args:
        model_or_params: a model (its trainable parameters), parameters, or parameter groups.
        lr: learning rate.
        eps: added to u under the root.
        weight_decay: decoupled weight decay, towards the pretrained weights.
        momentum: share of the last update that is kept, in [0, 1).
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__(model_or_params, defaults)

    def update(self, parameters: Sequence[torch.Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            self._update_one(parameter, group)

    def _update_one(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        state = self.state[parameter]
        found = layer_of(parameter)
        if found is not None:
            u = self._raise_sparse(state, gradient, *found)
        else:
            u = self._raise_dense(state, gradient)
        update = gradient * u.add_(group["eps"]).rsqrt_()
        if group["momentum"] > 0:
            previous = state.get("momentum", torch.zeros_like(update))
            update = update.mul_(1 - group["momentum"]).add_(previous, alpha=group["momentum"])
            if "momentum" not in state:
                self.note_support(parameter)
            state["momentum"] = update.clone()
        parameter.sub_(update.mul_(group["lr"]))
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])

    def _raise_sparse(
        self, state: dict[str, Any], gradient: torch.Tensor, layer: DeltaLayer, adapter: str
    ) -> torch.Tensor:
        """u [k] of the active weights; raises the accumulators of their rows and columns."""
        row, col = self._accumulators(state, layer.shape, gradient.device)
        indices = layer.spiel_indices[adapter]
        if optional.are_for_numba(gradient.device, len(gradient)):
            u: torch.Tensor = optional.module("scans").raise_sm3(indices, gradient, row, col)
            return u
        rows, cols = split_index(indices.long(), layer.shape[1])
        u = torch.minimum(row[rows], col[cols]).addcmul_(gradient, gradient)
        row.scatter_reduce_(0, rows, u, "amax")
        col.scatter_reduce_(0, cols, u, "amax")
        return u

    def _raise_dense(self, state: dict[str, Any], gradient: torch.Tensor) -> torch.Tensor:
        if gradient.dim() != 2:
            entries = state.setdefault("entries", torch.zeros_like(gradient))
            return entries.addcmul_(gradient, gradient).clone()
        row, col = self._accumulators(state, gradient.shape, gradient.device)
        u = torch.minimum(row[:, None], col[None, :]).addcmul_(gradient, gradient)
        torch.maximum(row, u.amax(1), out=row)
        torch.maximum(col, u.amax(0), out=col)
        return u

    def _accumulators(
        self, state: dict[str, Any], shape: Iterable[int], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if "row" not in state:
            state["row"], state["col"] = (
                torch.zeros(size, dtype=torch.float32, device=device) for size in shape
            )
        return state["row"], state["col"]

    def momenta(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The accumulators (row [rows], col [cols]) of a parameter of deltas; None if it has not
        been updated yet.

        Their product estimates the magnitude of the momenta of all the weight's entries.
        """
        state = self.state.get(parameter, {})
        return (state["row"], state["col"]) if "row" in state else None

    @torch.no_grad()
    def reselect(self, parameter: torch.Tensor, exchange: Exchange) -> None:
        """Moves the momentum of `parameter` to the support that its layer has now, 0 for grown
        weights.
        """
        state = self.state[parameter]
        if "momentum" in state:
            state["momentum"] = exchange.move(state["momentum"])
            self.note_support(parameter)
