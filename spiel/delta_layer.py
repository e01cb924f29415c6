"""DeltaLayer: a frozen layer that holds sparse deltas, and whose weight may hold them too.

The weight is live (see `spiel.live`), merged, or as it was pretrained.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from spiel import tap
from spiel.live import LiveEntries
from spiel.targets import weight_shape

#: The layer of every delta Parameter seen so far, for optimisers that need the weight's geometry.
#: Beside the Parameters, not on them: a Parameter with a layer attached could not be pickled.
_LAYERS = WeakIdKeyDictionary()

#: Held while pretrained entries are read: of two threads that make a weight live, the second must
#: not take the sums of the first for them.
_making = threading.Lock()


#: Adapters and their deltas [k] each.
Prepared = tuple[tuple[str, ...], tuple[nn.Parameter, ...]]


class _Deltas(nn.ParameterDict):
    """Adapter -> deltas. A cast of the model leaves their dtype alone: they are the master copy."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A layer around `base_layer`, whose weight adapters have deltas for.

    Attributes:
        spiel_deltas: adapter -> Parameter [k], the differences from the pretrained weight.
        spiel_indices: adapter -> buffer [k], the support: sorted flat indices into the weight.
        name: the module's name in the base model.
        shape: (rows, cols) of the stored weight, which flat indices refer to.
        numel: its number of entries.
    """

    adapter_layer_names = ("spiel_deltas",)
    other_param_names = ("spiel_indices",)

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        self.shape = weight_shape(base_layer, name)
        self.numel = math.prod(self.shape)
        self.spiel_deltas = _Deltas()
        self.spiel_indices = BufferDict(persistent=True)
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._live: LiveEntries | None = None
        #: What `prepare` gave, while that holds for every call: see `prepared`.
        self._prepared: Prepared | None = None
        self._is_in_pass = False
        #: Adapter -> the Parameter of deltas that _LAYERS knows.
        self._known: dict[str, nn.Parameter] = {}
        #: Adapter -> the dtype that its deltas were made in.
        self._dtypes: dict[str, torch.dtype] = {}

    def _deltas_of(self, adapter: str) -> nn.Parameter:
        """The Parameter [k]. Copying and loading make new ones, of which `layer_of` must know."""
        deltas: nn.Parameter = self.spiel_deltas[adapter]
        if self._known.get(adapter) is not deltas:
            self._known[adapter] = deltas
            _LAYERS[deltas] = weakref.ref(self)
        return deltas

    def restore_dtype(self, adapter: str) -> torch.dtype | None:
        """Undoes a cast of the deltas that went around the layer (`parameter.data = ...`), as far
        as their values survived it; returns the dtype they were cast to, None if they were not.
        """
        deltas = self.spiel_deltas[adapter]
        found, own = deltas.dtype, self._dtypes[adapter]
        if found == own:
            return None
        deltas.data = deltas.data.to(own)
        return found

    # -- live weights -----------------------------------------------------------------------

    def prepare(self) -> Prepared:
        """Brings the weight up to date with the wanted adapters; returns these and their deltas.

        Nothing is cached between calls: an optimizer may have changed the deltas by any means.
        """
        tap.forget()
        adapters = tuple(self._wanted())
        self.make_live(adapters)
        return adapters, tuple(self._deltas_of(adapter) for adapter in adapters)

    def adapters_and_deltas(self) -> Prepared:
        """What `prepare` gives, or gave before in the same pass: see `prepared`."""
        if self._prepared is not None:
            return self._prepared
        found = self.prepare()
        if self._is_in_pass:
            self._prepared = found
        return found

    @property
    def _is_written_late(self) -> bool:
        """Whether `prepared` leaves the layer to the call that needs it."""
        return self._weight.is_cuda

    @property
    def _weight(self) -> torch.Tensor:
        weight = self.base_layer.weight
        assert isinstance(weight, torch.Tensor)
        return weight

    def _wanted(self) -> list[str]:
        if self.disable_adapters:
            return []
        return [name for name in self.active_adapters if name in self.spiel_deltas]

    def make_live(self, adapters: Sequence[str]) -> None:
        """Brings the weight up to date with the deltas of `adapters`."""
        if not self.merged and self._hold(adapters):
            assert self._live is not None
            self._live.write(self.spiel_deltas)

    def _hold(self, adapters: Sequence[str]) -> bool:
        """Makes the weight ready to be written to by `adapters`; False if there are none."""
        supports = {name: self.spiel_indices[name] for name in adapters}
        if not self._holds(supports):
            with _making:
                if not self._holds(supports):
                    self._hold_anew(supports)
        return self._live is not None

    def _holds(self, supports: dict[str, torch.Tensor]) -> bool:
        live = self._live
        return live is not None and live.is_of(self._weight, supports)

    def _hold_anew(self, supports: dict[str, torch.Tensor]) -> None:
        """As `_hold`, where the weight has other deltas in it or none."""
        if self._weight.is_meta and not all(i.is_meta for i in supports.values()):
            raise RuntimeError(
                f"{self.name}: the weight is offloaded (meta device), so deltas cannot be put "
                "into it; load the model without offloading"
            )
        self.put_back()
        self._live = LiveEntries(self._weight, supports) if supports else None

    @property
    def live_adapters(self) -> tuple[str, ...]:
        """The adapters whose deltas are in the weight now, merged ones included."""
        return () if self._live is None else tuple(self._live.supports)

    def put_back(self) -> None:
        """Restores the pretrained weight, bit for bit."""
        self._prepared = None
        if self._live is not None:
            self._live.put_back(self.spiel_deltas)
            self._live = None

    # -- merging ----------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the deltas part of the weight; `unmerge` undoes it exactly.

        Raises:
            ValueError: `safe_merge` and a merged entry would not be finite. Nothing was merged.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.spiel_deltas]
        if not names:
            return
        before = self.merged_adapters
        self.unmerge()
        self._hold([*before, *names])
        assert self._live is not None
        if safe_merge and not bool(self._live.entries(self.spiel_deltas).isfinite().all()):
            self.unmerge()
            if before:
                self.merge(adapter_names=before)
            raise ValueError(
                "NaNs detected in the merged weights. The adapter "
                f"{', '.join(names)} seems to be broken (module {self.name})"
            )
        self._live.write(self.spiel_deltas)
        self.merged_adapters = [*before, *names]

    def unmerge(self) -> None:
        """Takes merged deltas out of the weight again, bit for bit."""
        self.put_back()
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with or without the deltas in its weight. Called by peft."""
        if not merge:
            self.unmerge()
            return self.base_layer
        self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:  # nothing to merge here, but deltas may be live
            self.put_back()
        self._live = None  # from now on the weight is the caller's: nobody puts it back
        return self.base_layer

    def refuse_merged(self) -> None:
        """Raises RuntimeError if adapters are merged, whose deltas a new support would lose."""
        if self.merged:
            raise RuntimeError(
                f"{self.name} has merged adapters ({', '.join(self.merged_adapters)}); unmerge "
                "first (model.unmerge_adapter())"
            )


@contextmanager
def prepared(layers: Iterable[DeltaLayer]) -> Iterator[None]:
    """Within the context, as for one forward pass of the model, deltas do not change, and each
    weight is written to once.

    On a CPU that is now, one after the other: between the products of a forward pass each of these
    small operations would find the caches full of other things, and take several times as long. On
    a GPU it is when the layer is called: by then it is busy with the layers before, and does not
    wait for the CPU that launches so many small kernels.
    """
    layers = list(layers)
    for layer in layers:
        layer._is_in_pass = True
        if not layer._is_written_late:
            layer.adapters_and_deltas()
    try:
        yield
    finally:
        for layer in layers:
            layer._is_in_pass, layer._prepared = False, None


def layer_of(parameter: torch.Tensor) -> tuple[DeltaLayer, str] | None:
    """The layer and adapter that `parameter` holds the deltas of, None if it holds none."""
    layer = _LAYERS[parameter]() if parameter in _LAYERS else None
    if layer is None:
        return None
    for adapter, deltas in layer.spiel_deltas.items():
        if deltas is parameter:
            return layer, adapter
    return None
