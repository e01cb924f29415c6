"""SpielLinear4bit: sparse deltas on a weight that bitsandbytes keeps in 4 bits.

A packed weight cannot hold sums, so the deltas are added to the dequantised temporary that a
4-bit layer makes anyway, once going forward and once going backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spiel.layer import SpielLinear
from spiel.live import LiveEntries


def is_4bit(layer: nn.Module) -> bool:
    """Whether this is bitsandbytes' Linear4bit; answers without importing bitsandbytes."""
    return any(cls.__name__ == "Linear4bit" for cls in type(layer).__mro__)


class _LinearOfTemporary(torch.autograd.Function):
    """x @ W.T with a W that is made when needed, and neither saved nor given a gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layer: SpielLinear4bit, adapters: tuple[str, ...]
    ) -> torch.Tensor:
        ctx.layer, ctx.adapters = layer, adapters
        return F.linear(x, layer.summed_weight(adapters, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad_out @ ctx.layer.summed_weight(ctx.adapters, grad_out.dtype), None, None


class SpielLinear4bit(SpielLinear):
    """A bitsandbytes Linear4bit (nf4 or fp4, with or without double quantisation) with deltas.

    Raises:
        ValueError: its weight was repacked for CPU inference, which cannot be undone exactly.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        if getattr(self._packing, "packing_format_for_cpu", False):
            raise ValueError(
                f"the 4-bit weight of {name} was repacked for CPU inference, which loses precision "
                "and gradients: load the model anew and adapt it before its first evaluation"
            )
        # That repacking happens in the first forward pass in eval mode, unless this is off.
        base_layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]

    @property
    def _packing(self) -> Any:
        return self.base_layer.weight.quant_state  # type: ignore[union-attr]

    def make_live(self, adapters: Sequence[str]) -> None:
        """Nothing to do: the deltas never enter the packed weight."""

    def put_back(self) -> None:
        """Nothing to do: the packed weight never changes."""

    def summed_weight(self, adapters: tuple[str, ...], dtype: torch.dtype) -> torch.Tensor:
        """The dequantised weight [rows, cols] in `dtype`, with the deltas of `adapters` added."""
        from bitsandbytes.functional import dequantize_4bit

        with torch.no_grad():
            dense = dequantize_4bit(self._weight.data, self._packing).to(dtype)
            for name in adapters:
                LiveEntries(dense, {name: self.spiel_indices[name]}).write(self.spiel_deltas)
        return dense

    @torch.compiler.disable  # as in the base class
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapters, deltas = self.adapters_and_deltas()
        if not adapters:
            return self.base_layer(x, *args, **kwargs)
        compute_x = x.to(self._compute_dtype(x))
        with torch.autocast(x.device.type, enabled=False):
            out = _LinearOfTemporary.apply(compute_x, self, adapters)
            if self.base_layer.bias is not None:
                out = out + self.base_layer.bias.to(out.dtype)
        return self.tap(out, x, adapters, deltas).to(x.dtype)

    def _compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        compute_dtype: Any = self.base_layer.compute_dtype
        return compute_dtype or x.dtype

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        self.refuse_merging()

    def refuse_merging(self) -> None:
        """Raises ValueError: there is no merging into 4 bits."""
        raise ValueError(
            f"SpIEL does not merge into the 4-bit weight of {self.name}: quantising the sums again "
            "would change them. Keep the adapter beside the model, or load the base model "
            "unquantised (or dequantised: model.dequantize()) and merge there"
        )
