"""What a Reselector asks of model and optimizer before it changes anything."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from spiel.config import SpielConfig
from spiel.layer import SpielLinear
from spiel.optim import SpielAdamW, check_state_moves
from spiel.optimizer import SpielOptimizer
from spiel.sm3 import SpielSM3

Layers = Mapping[str, SpielLinear]


def config_of(model: nn.Module, adapter: str) -> SpielConfig:
    """The adapter's configuration, which peft keeps on the tuner and on the model inside it."""
    for module in model.modules():
        config = vars(module).get("peft_config", {}).get(adapter)
        if isinstance(config, SpielConfig):
            return config
    raise ValueError(f"the model has no SpielConfig of adapter {adapter!r}")


def check_unsharded(model: nn.Module, layers: Layers, adapter: str) -> None:
    """Raises ValueError if ranks hold parts of weights (FSDP, tensor parallelism, ZeRO-3), of which
    neither the flat indices nor the gradients here know.
    """
    parts = [
        name
        for name, layer in layers.items()
        if _is_sharded(layer.base_layer.weight) or _is_sharded(layer.spiel_deltas[adapter])
    ]
    if parts or any(_is_a(module, "FullyShardedDataParallel") for module in model.modules()):
        raise ValueError(
            f"{parts[0] if parts else 'the model'} is sharded: SpIEL trains in data-parallel "
            "processes that each hold all of the model, as in DistributedDataParallel"
        )


def _is_sharded(tensor: object) -> bool:
    return _is_a(tensor, "DTensor") or hasattr(tensor, "ds_id")


def _is_a(thing: object, name: str) -> bool:
    """Whether it is of a class of that name, which need not be imported to know."""
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def check_layers(layers: Layers, adapter: str) -> None:
    """Raises ValueError if the adapter is frozen or its base weights are not, RuntimeError if
    adapters are merged; gives deltas that something has cast their own dtype again, with a warning.
    """
    cast = {layer.restore_dtype(adapter) for layer in layers.values()} - {None}
    if cast:
        warnings.warn(
            f"something has cast the deltas to {', '.join(map(str, cast))} (as TRL's trainers do "
            "with all that trains on a quantised model); they have the dtype of `delta_dtype` "
            "again, in which small updates are not lost",
            stacklevel=4,
        )
    for name, layer in layers.items():
        layer.refuse_merged()
        if not layer.spiel_deltas[adapter].requires_grad:
            raise ValueError(
                f"the adapter {adapter!r} is frozen (the deltas of {name} do not require a "
                "gradient): load it with is_trainable=True, or activate it with set_adapter"
            )
        if layer.base_layer.weight.requires_grad:
            raise ValueError(
                f"the base weight of {name} requires a gradient too, but its active entries are "
                "written anew from the pretrained ones at each forward pass: freeze it "
                "(requires_grad_(False))"
            )


def check_optimizer(
    optimizer: torch.optim.Optimizer, layers: Layers, adapter: str, growth: str
) -> None:
    """Raises unless the optimizer can train these deltas and serve this growth."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for layer_name, layer in layers.items():
        if id(layer.spiel_deltas[adapter]) not in known:
            raise ValueError(
                f"the optimizer does not have the deltas of {layer_name}: make it after "
                "get_peft_model, as spiel.SpielAdamW(model, lr=...)"
            )
    name = type(optimizer).__name__
    if growth == "ma" and not isinstance(optimizer, SpielSM3):
        raise TypeError(f"growth 'ma' reads the momenta of spiel.SpielSM3, got {name}")
    if growth == "ag" and isinstance(optimizer, SpielSM3 | torch.optim.LBFGS):
        raise TypeError(
            f"growth 'ag' cannot use {name}, whose state is not one per weight: use "
            "spiel.SpielAdamW (or growth 'ma' with spiel.SpielSM3)"
        )
    if growth == "ag" and not isinstance(optimizer, SpielAdamW):
        warnings.warn(
            f"{name} keeps no age for each weight: grown weights start from a state of 0; "
            "spiel.SpielAdamW is made for growth 'ag'",
            stacklevel=4,
        )


def check_momenta(optimizer: torch.optim.Optimizer, layers: Layers, adapter: str) -> None:
    """Raises RuntimeError if the optimizer's momenta are of other weights than the active ones."""
    if not isinstance(optimizer, SpielOptimizer):
        return  # which keeps no note of it
    for name, layer in layers.items():
        if not optimizer.is_of_support(layer, adapter):
            raise RuntimeError(
                f"the support of {name} is another than when the optimizer last stepped (an "
                "adapter was loaded, or set_support called), so its momenta are of other weights: "
                "load the optimizer's state too, or make a new optimizer"
            )


def check_state(optimizer: torch.optim.Optimizer, layers: Layers, adapter: str) -> None:
    """Raises TypeError if the optimizer keeps state that cannot follow a reselection.

    An optimizer has state only once it has stepped, so that this cannot be known before.
    """
    if not isinstance(optimizer, SpielAdamW | SpielSM3):
        for layer in layers.values():
            check_state_moves(optimizer, layer.spiel_deltas[adapter])
