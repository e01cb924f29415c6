"""SpielLinear: a frozen linear layer whose active entries hold the pretrained weight plus a delta.

Live weights: while an adapter is active, entry i of its support holds round(W0[i] + delta[i]) in
the base weight itself, so the forward pass is the base layer's own. The fp32 deltas are the master
copy; the weight is rewritten from them, never accumulated into. The k original entries are kept,
so that the pretrained weight can be put back bit for bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary
from transformers.pytorch_utils import Conv1D

from spiel import ops
from spiel.support import check_support, index_dtype, random_support

#: Called in backward with left [tokens, rows] and right [tokens, cols], of which left.T @ right is
#: the weight's gradient, and with its entries [k] at the support.
Observer = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

#: The layer of every delta Parameter seen so far, for optimisers that need the weight's geometry.
#: Beside the Parameters, not on them: a Parameter with a layer attached could not be pickled.
_LAYERS = WeakIdKeyDictionary()


@dataclass
class _Live:
    """What one adapter has written into the weight: where, and what stood there before."""

    indices: torch.Tensor  # the support's own tensor, not a copy
    version: int  # of that tensor, to notice that somebody wrote into it
    originals: torch.Tensor  # [k], dtype of the weight


class _Tap(torch.autograd.Function):
    """Lets the base layer's output pass, and forms the gradient of the deltas going backward."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        deltas: torch.Tensor,
        layer: SpielLinear,
        adapter: str,
    ) -> torch.Tensor:
        ctx.mark_dirty(out)  # the same tensor with a new history: nothing is copied or viewed
        ctx.save_for_backward(x)
        ctx.layer, ctx.adapter = layer, adapter
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return grad_out, None, ctx.layer.delta_gradient(ctx.adapter, x, grad_out), None, None


class SpielLinear(nn.Module, BaseTunerLayer):
    """A `torch.nn.Linear` or GPT-2 `Conv1D` with sparse deltas on its weight.

    Attributes:
        spiel_deltas: adapter -> Parameter [k], the differences from the pretrained weight.
        spiel_indices: adapter -> buffer [k], the support: sorted flat indices into the weight.
        name: the module's name in the base model.
        shape: (rows, cols) of the stored weight, which flat indices refer to.
    """

    adapter_layer_names = ("spiel_deltas",)
    other_param_names = ("spiel_indices",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.shape = weight_shape(base_layer, name)
        self.in_features, self.out_features = self.shape[::-1]
        if isinstance(base_layer, Conv1D):
            self.in_features, self.out_features = self.shape
        self.spiel_deltas = nn.ParameterDict()
        self.spiel_indices = BufferDict(persistent=True)
        self.observers: dict[str, Observer] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._live: dict[str, _Live] = {}
        self.register_state_dict_pre_hook(_put_back_before_saving)
        self.register_load_state_dict_post_hook(_check_loaded)

    # -- adapters ---------------------------------------------------------------------------

    def update_layer(self, adapter: str, k: int, dtype: torch.dtype) -> None:
        """Adds `adapter` with `k` deltas of 0 at random places."""
        device = self._weight.device
        numel = self.shape[0] * self.shape[1]
        deltas = torch.zeros(k, dtype=dtype, device=device)
        self.spiel_deltas[adapter] = nn.Parameter(deltas)
        self.spiel_indices[adapter] = random_support(k, numel).to(device)
        _LAYERS[self.spiel_deltas[adapter]] = weakref.ref(self)
        self.set_adapter(self.active_adapters)

    def set_support(self, adapter: str, indices: torch.Tensor) -> None:
        """Replaces the support, whose size stays, and sets all deltas to 0."""
        numel = self.shape[0] * self.shape[1]
        deltas = self.spiel_deltas[adapter]
        indices = indices.detach().to(device=deltas.device, dtype=index_dtype(numel))
        check_support(indices, len(deltas), numel, self.name)
        self.replace_support(adapter, indices.clone(), torch.zeros_like(deltas))

    def replace_support(self, adapter: str, indices: torch.Tensor, deltas: torch.Tensor) -> None:
        """Takes over a checked support [k] and its deltas [k]; the Parameter stays the same."""
        self.put_back()
        self.spiel_indices[adapter] = indices
        with torch.no_grad():
            self.spiel_deltas[adapter].copy_(deltas)

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

    # -- live weights -----------------------------------------------------------------------

    @property
    def _weight(self) -> torch.Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _wanted(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.spiel_deltas]

    def make_live(self) -> None:
        """Brings the weight up to date with the active adapters' deltas.

        Nothing is cached between calls: an optimizer may have changed the deltas by any means.
        """
        if self.merged:
            return
        wanted = self._wanted()
        if list(self._live) != wanted:
            self.put_back()
            self._remember(wanted)
        self._write()

    def put_back(self) -> None:
        """Restores the pretrained weight, bit for bit."""
        for name, live in self._live.items():
            if live.indices._version != live.version:
                raise RuntimeError(
                    f"{self.name}: the indices of adapter {name!r} were written into while its "
                    "deltas were in the weight; use spiel.set_support to change a support"
                )
            self._set_entries(live.indices, live.originals)
        self._live = {}

    def _remember(self, adapters: list[str]) -> None:
        """Keeps the pretrained entries at the supports of `adapters`; the weight is pristine."""
        flat = self._weight.detach()
        for name in adapters:
            indices = self.spiel_indices[name]
            originals = flat.take(indices.long())
            self._live[name] = _Live(indices, indices._version, originals)

    def _write(self) -> None:
        """Writes round(original + delta) into the weight, for each live adapter."""
        if len(self._live) > 1:  # supports may overlap: start from the pretrained weight and add
            for live in self._live.values():
                self._set_entries(live.indices, live.originals)
        for position, (name, live) in enumerate(self._live.items()):
            entries = live.originals
            if position > 0:
                entries = self._weight.detach().take(live.indices.long())
            self._set_entries(live.indices, self._sum(entries, self.spiel_deltas[name].detach()))

    def _sum(self, entries: torch.Tensor, deltas: torch.Tensor) -> torch.Tensor:
        """entries + deltas, added in the wider of their dtypes, rounded once to the weight's."""
        return (entries + deltas).to(self._weight.dtype)

    def _set_entries(self, indices: torch.Tensor, entries: torch.Tensor) -> None:
        # Through `.data`, so that writing what already stands there does not invalidate a graph.
        self._weight.data.put_(indices.long(), entries)

    # -- forward and backward ---------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("adapter_names") is not None:
            raise ValueError("SpIEL cannot mix adapters within a batch (adapter_names)")
        self.make_live()
        out = self.base_layer(x, *args, **kwargs)
        if not self.merged and torch.is_grad_enabled():
            for name in self._live:
                deltas = self.spiel_deltas[name]
                _LAYERS[deltas] = weakref.ref(self)  # copies and loads make new Parameters
                if deltas.requires_grad:
                    out = _Tap.apply(out, x, deltas, self, name)
        return out

    def delta_gradient(self, adapter: str, x: torch.Tensor, grad_out: torch.Tensor) -> torch.Tensor:
        """Gradient [k] of the deltas from the layer's input and the gradient of its output."""
        left, right = grad_out.flatten(0, -2), x.flatten(0, -2)
        if isinstance(self.base_layer, Conv1D):
            left, right = right, left
        gradient = ops.sampled_gradient(left, right, self.spiel_indices[adapter])
        if adapter in self.observers:
            self.observers[adapter](left, right, gradient)
        return gradient.to(self.spiel_deltas[adapter].dtype)

    # -- merging ----------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the deltas part of the weight; `unmerge` undoes it exactly.

        Raises:
            ValueError: `safe_merge` and a merged entry would not be finite.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spiel_deltas]
        if not names:
            return
        wanted = [*self.merged_adapters, *names]
        self.put_back()
        if safe_merge:
            for name in names:
                if not bool(torch.isfinite(self.spiel_deltas[name]).all()):
                    raise ValueError(
                        f"NaNs detected in the merged weights of {self.name}. "
                        f"The adapter {name} seems to be broken"
                    )
        self._remember(wanted)
        self._write()
        self.merged_adapters = wanted

    def unmerge(self) -> None:
        """Takes merged deltas out of the weight again, bit for bit."""
        self.put_back()
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with or without the deltas in its weight. Called by peft."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        else:
            self.unmerge()
        return self.base_layer

    # -- moving, copying, saving ------------------------------------------------------------

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # A change of dtype or device must see the pretrained weight, not rounded sums.
        if self.merged:
            merged = self.merged_adapters
            self.unmerge()
            super()._apply(fn, recurse)
            self.merge(adapter_names=merged)
            return self
        self.put_back()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if not self.merged:
            self.put_back()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        if not self.merged:
            self.put_back()
        return {**self.__dict__, "observers": {}}

    def __repr__(self) -> str:
        return "spiel." + super().__repr__()


def layer_of(parameter: torch.Tensor) -> tuple[SpielLinear, str] | None:
    """The layer and adapter that `parameter` holds the deltas of, None if it holds none."""
    layer = _LAYERS[parameter]() if parameter in _LAYERS else None
    if layer is None:
        return None
    for adapter, deltas in layer.spiel_deltas.items():
        if deltas is parameter:
            return layer, adapter
    return None


def weight_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(rows, cols) of the stored weight of a layer that SpIEL can adapt.

    Raises:
        TypeError: SpIEL cannot adapt such a layer.
    """
    weight = getattr(layer, "weight", None)
    supported = isinstance(layer, (nn.Linear, Conv1D))
    if supported and weight is not None and weight.is_floating_point():
        rows, cols = weight.shape
        return rows, cols
    raise TypeError(
        f"SpIEL cannot adapt {name}, a {type(layer).__name__}: target torch.nn.Linear or "
        "transformers' Conv1D layers with a float weight"
    )


def _put_back_before_saving(layer: SpielLinear, *_: Any) -> None:
    if not layer.merged:
        layer.put_back()


def _check_loaded(layer: SpielLinear, _: Any) -> None:
    for name, indices in layer.spiel_indices.items():
        deltas = layer.spiel_deltas[name]
        if deltas.is_meta or indices.is_meta:
            continue
        where = f"{layer.name} (adapter {name!r})"
        check_support(indices, len(deltas), layer.shape[0] * layer.shape[1], where)
        if not bool(torch.isfinite(deltas).all()):
            raise ValueError(f"{where}: the delta values contain NaN or infinity")
