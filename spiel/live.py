"""Live weights: while adapters are active, the base weight itself holds round(W0 + delta).

The forward pass is then the base layer's own. The deltas are the master copy: the weight is always
recomputed from them and from the pretrained entries kept here, never accumulated into, so nothing
is lost to rounding and the pretrained weight can be put back bit for bit.

Every forward pass of the model rewrites the k entries, since deltas may change without a trace (raw
memory), and `generate` does so once; merged adapters are spared that. `state_dict`, copies and
casts of a model see the pretrained weight; the Parameter itself shows the sums until something puts
it back. Who averages all parameters must average the deltas alone, or do it with the adapter
disabled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from spiel import ops
from spiel.support import Seen

#: Adapter -> deltas [k].
Deltas = Mapping[str, torch.Tensor] | nn.ParameterDict

#: Integers as wide as an entry, by bytes.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class LiveEntries:
    """The entries of one weight that adapters have written to, and what stood there before.

    Made on a pretrained weight, which it does not change until `write`.

    Memory: the pretrained entries, in the weight's dtype; for several adapters also the union of
    their supports and 8 bytes for each of their deltas.

    Args:
        weight: [rows, cols]; any strides.
        supports: adapter -> flat indices [k], sorted and unique. The tensors themselves are kept.
    """

    def __init__(self, weight: torch.Tensor, supports: Mapping[str, torch.Tensor]) -> None:
        self.weight = weight
        self.supports = dict(supports)
        self._seen = Seen(self.supports.values())
        self._address = weight.data_ptr()
        #: Flat indices of the entries, and for each adapter where in it its own are (None: all).
        self._places, self._slots = _union(list(self.supports.values()))
        self._originals = _read(weight, self._places)

    def is_of(self, weight: torch.Tensor, supports: Mapping[str, torch.Tensor]) -> bool:
        """Whether this weight and these supports, in this order, are the ones it was made for."""
        return (
            self.weight is weight
            and self._address == weight.data_ptr()
            and list(self.supports) == list(supports)
            and all(supports[name] is indices for name, indices in self.supports.items())
        )

    def entries(self, deltas: Deltas) -> torch.Tensor:
        """round(W0 + sum of deltas), in the weight's dtype and rounded once."""
        sums = self._originals
        for name, slots in zip(self.supports, self._slots, strict=True):
            values = deltas[name].detach()
            if slots is None:
                sums = sums + values
            else:
                wide = sums.to(torch.promote_types(sums.dtype, values.dtype))
                sums = wide.index_add(0, slots, values.to(wide.dtype))
        return sums.to(self._originals.dtype)

    def write(self, deltas: Deltas) -> None:
        """Brings the weight up to date with the adapters' deltas [k]."""
        if len(self.supports) == 1:
            (own,) = (deltas[name].detach() for name in self.supports)
            if ops.write_entries(self.weight.detach(), self._places, self._originals, own):
                return
        _write(self.weight, self._places, self.entries(deltas))

    def put_back(self, deltas: Deltas) -> None:
        """Restores the pretrained entries, if the sums with these deltas [k] stand in the weight.

        Raises:
            RuntimeError: a support was written into, so nobody knows where they belong; or the
                weight was given other memory, and what stands there is neither.
        """
        if self._address != self.weight.data_ptr() and not self._has_moved(deltas):
            return
        if not self._seen.is_of(self.supports.values()):
            raise RuntimeError(
                "indices were written into while their deltas were in the weight; use "
                "spiel.set_support to change a support"
            )
        _write(self.weight, self._places, self._originals)

    def _has_moved(self, deltas: Deltas) -> bool:
        """Whether other memory that the weight was given (`weight.data = ...`) has the sums in it,
        as a cast of every parameter does, and not the pretrained entries.
        """
        if self.weight.device != self._originals.device or self.weight.numel() == 0:
            return False  # offloaded
        found = _read(self.weight, self._places)
        if torch.equal(found, self._originals.to(found)):
            return False
        if torch.equal(found, self.entries(deltas).to(found)):
            return True
        raise RuntimeError(
            "a weight was given other memory (weight.data = ...) while deltas were in it, and "
            "which of its entries are pretrained can no longer be told: load the model anew, and "
            "change weights through it (model.to, load_state_dict) or with the adapter disabled"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Tensors that were copied or unpickled stand elsewhere, and count versions from 0 again.
        self.__dict__.update(state)
        self._address = self.weight.data_ptr()
        self._seen = Seen(self.supports.values())


def _union(
    supports: list[torch.Tensor],
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """The union of supports, sorted, and where in it the indices of each one are."""
    if len(supports) == 1:
        return supports[0], [None]
    places = torch.cat(supports).unique()
    return places, [torch.searchsorted(places, indices) for indices in supports]


def _read(weight: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    weight = weight.detach()
    if weight.is_contiguous():
        return weight.view(-1).index_select(0, places)
    return weight.take(places.long())


def _write(weight: torch.Tensor, places: torch.Tensor, entries: torch.Tensor) -> None:
    # Through `.data`, so that writing what already stands there does not invalidate a graph.
    weight, places = weight.data, places.long()
    entries = entries.to(device=weight.device, dtype=weight.dtype)
    if weight.is_contiguous():
        # As integers: of 16-bit floats a CPU's `scatter_` makes a copy of the weight in fp32.
        bits = _BITS[weight.element_size()]
        weight.view(-1).view(bits).scatter_(0, places, entries.view(bits))
    else:
        cols = weight.shape[1]
        weight[places // cols, places % cols] = entries
