"""SpielLinear: a frozen linear layer whose active entries hold the pretrained weight plus a delta.

The weights are live: see `spiel.live`. Backward forms the gradient of the deltas only, from the
layer's input, which is all that autograd keeps, and not even that where the model's own graph gives
it again: see `spiel.recompute`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spiel import ops
from spiel.delta_layer import DeltaLayer
from spiel.ops.product import Operand, flat, formed
from spiel.support import check_loaded, check_support, index_dtype, random_support
from spiel.tap import Observer, Tap


class SpielLinear(DeltaLayer):
    """A `torch.nn.Linear` or GPT-2 `Conv1D` with sparse deltas on its weight."""

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        #: Whether inputs belong to the rows of the stored weight, as in GPT-2.
        self.inputs_are_rows = isinstance(base_layer, Conv1D)
        self.in_features, self.out_features = self.shape[:: 1 if self.inputs_are_rows else -1]
        self.observers: dict[str, Observer] = {}
        #: Adapter -> the gradient at its support, as far as backward has asked for it.
        self._gradients: dict[str, ops.SupportGradients] = {}
        self.register_state_dict_pre_hook(_put_back_before_saving)

    # -- adapters ---------------------------------------------------------------------------

    def update_layer(self, adapter: str, k: int, dtype: torch.dtype) -> None:
        """Adds `adapter` with `k` deltas of 0 at random places."""
        device = self._weight.device
        deltas = torch.zeros(k, dtype=dtype, device=device)
        self.spiel_deltas[adapter] = nn.Parameter(deltas)
        self._dtypes[adapter] = dtype
        self.spiel_indices[adapter] = self._first_support(adapter, k, device)
        self._deltas_of(adapter)
        self.set_adapter(self.active_adapters)

    def _first_support(self, adapter: str, k: int, device: torch.device) -> torch.Tensor:
        # Deltas without values (low_cpu_mem_usage) are about to be loaded, and so is their support.
        if self.spiel_deltas[adapter].is_meta and device.type != "meta":
            return torch.arange(k, dtype=index_dtype(self.numel), device=device)
        return random_support(k, self.numel, device)

    def set_support(self, adapter: str, indices: torch.Tensor) -> None:
        """Replaces the support, whose size stays, and sets all deltas to 0."""
        self.check_support(adapter, indices)
        deltas = self.spiel_deltas[adapter]
        indices = indices.detach().to(deltas.device, index_dtype(self.numel), copy=True)
        self.replace_support(adapter, indices, torch.zeros_like(deltas))

    def check_support(self, adapter: str, indices: torch.Tensor) -> None:
        """Raises what `set_support` would raise, which then changes nothing."""
        self.refuse_merged()
        check_support(indices, len(self.spiel_deltas[adapter]), self.numel, self.name)

    def replace_support(self, adapter: str, indices: torch.Tensor, deltas: torch.Tensor) -> None:
        """Takes over a checked support [k] and its deltas [k], in memory of their own: who kept the
        former ones, as a state dict does, still has a pair of them. The Parameter stays the same.
        """
        self.refuse_merged()
        self.put_back()
        self._gradients.pop(adapter, None)
        self.spiel_indices[adapter] = indices
        parameter = self.spiel_deltas[adapter]
        parameter.data = deltas.to(parameter)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        if not self.merged:
            self.put_back()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        if not enabled:
            self.unmerge() if self.merged else self.put_back()

    def delete_adapter(self, adapter_name: str) -> None:
        if not self.merged:
            self.put_back()
        self.observers.pop(adapter_name, None)
        self._gradients.pop(adapter_name, None)
        self._known.pop(adapter_name, None)
        self._dtypes.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # peft would also cast the deltas to the base weight's dtype; they are the master copy.
        target = device or self._weight.device
        if adapter_name in self.spiel_deltas and target.type != "meta":
            deltas = self.spiel_deltas[adapter_name]
            if deltas.device.type != "meta":
                deltas.data = deltas.data.to(target)
            self.spiel_indices[adapter_name] = self.spiel_indices[adapter_name].to(target)

    # -- forward and backward ---------------------------------------------------------------

    @torch.compiler.disable  # what is live, and the graph of the deltas, must not be traced
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output [..., out_features] with the active adapters' deltas."""
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapters, deltas = self.adapters_and_deltas()
        out = self.base_layer(x, *args, **kwargs)
        return self.tap(out, x, adapters, deltas)

    def tap(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        adapters: tuple[str, ...],
        deltas: tuple[torch.Tensor, ...],
    ) -> torch.Tensor:
        """`out`, with what gives the deltas of `adapters` their gradients in its history."""
        if not torch.is_grad_enabled():
            return out
        return Tap.apply(out, x, self, adapters, *deltas)

    def delta_gradient(self, adapter: str, x: Operand, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient [k] in fp32 of the deltas, from the layer's input and its output's gradient."""
        left, right = grad_out.reshape(-1, grad_out.shape[-1]), flat(x)
        if self.inputs_are_rows:
            left, right = formed(right), left
        indices, observer = self.spiel_indices[adapter], self.observers.get(adapter)
        if observer is not None:
            return observer.observe(left, right, indices)
        gradients = ops.SupportGradients.renewed(self._gradients.get(adapter), indices)
        self._gradients[adapter] = gradients
        return gradients(left, right)[0]

    # -- moving, copying, saving ------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        self._gradients.clear()
        # A change of dtype or device must see the pretrained weight, not rounded sums.
        if self.merged:
            merged = self.merged_adapters
            self.unmerge()
            super()._apply(fn, recurse)
            self.merge(adapter_names=merged)
            return self
        self.put_back()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        if self.merged and any(key.startswith(prefix) for key in state_dict):
            raise RuntimeError(f"{self.name}: unmerge its adapters before loading a state dict")
        for adapter, deltas in self.spiel_deltas.items():
            check_loaded(  # before anything is changed
                state_dict.get(f"{prefix}spiel_indices.{adapter}"),
                state_dict.get(f"{prefix}spiel_deltas.{adapter}"),
                len(deltas),
                self.numel,
                f"{self.name} (adapter {adapter!r})",
            )
        for adapter in self.spiel_deltas:
            self.restore_dtype(adapter)
        self.put_back()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if not self.merged:
            self.put_back()
        tables: dict[str, Any] = {name: {} for name in ("observers", "_gradients", "_known")}
        return {**self.__dict__, **tables, "_prepared": None, "_is_in_pass": False}

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()


def _put_back_before_saving(layer: SpielLinear, *_: Any) -> None:
    if not layer.merged:
        layer.put_back()
