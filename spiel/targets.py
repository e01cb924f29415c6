"""Which modules SpIEL adapts: what a layer must be, and what "all-linear" stands for."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from spiel.budget import count_parameters
from spiel.config import SpielConfig

#: From which share of a model on it is told that weights cannot be adapted.
NOTABLE_SHARE = 0.1

#: Dtypes of weights that SpIEL can adapt; in narrower ones deltas would round away.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def weight_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(rows, cols) of the stored weight of a layer that SpIEL can adapt.

    Raises:
        TypeError: SpIEL cannot adapt such a layer.
    """
    packing = getattr(getattr(layer, "weight", None), "quant_state", None)
    if packing is not None:
        rows, cols = packing.shape
        return rows, cols
    # A parametrised or quantised weight would not keep what is written into it; a forward pass of
    # the layer's own may use the weight in a way that backward here knows nothing of.
    weight = layer._parameters.get("weight")
    has_own_forward = type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    is_attention_part = isinstance(layer, NonDynamicallyQuantizableLinear)
    if has_own_forward or is_attention_part or weight is None or not _is_float(weight):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise TypeError(
            f"SpIEL cannot adapt {name}, a {kind}: it adapts torch.nn.Linear and "
            "transformers' Conv1D with a float weight, and bitsandbytes' Linear4bit, that no other "
            "kind of adapter is in; leave this module out (target_modules, exclude_modules), or "
            "load the model unquantised"
        )
    rows, cols = weight.shape
    return rows, cols


def _is_float(weight: torch.Tensor) -> bool:
    """Whether it is a plain float tensor; quantised ones of classes of their own may say a float
    dtype too. Sharded ones are another matter: see `spiel.checks`.
    """
    is_plain = type(weight).__name__ in ("Parameter", "DTensor")
    return is_plain and weight.dtype in WEIGHT_DTYPES


def narrow_all_linear(config: SpielConfig, model: nn.Module) -> None:
    """Leaves out of the full names that "all-linear" stood for what peft leaves in: the copies of
    other adapters' `modules_to_save`, layers that are not in `layers_to_transform`, and, with a
    warning, what SpIEL cannot adapt, unless that is all there is.
    """
    wrappers = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    inside = tuple(f"{name}." for name in wrappers)
    names = {name for name in config.target_modules or () if not name.startswith(inside)}
    if config.layers_to_transform is not None:
        names = {name for name in names if _is_in_layers(config, name)}
        if not names:
            raise ValueError(f"no layer is one of layers_to_transform {config.layers_to_transform}")
    refused = sorted(name for name in names if not _is_adaptable(model.get_submodule(name), name))
    if 0 < len(refused) < len(names):
        warnings.warn(
            f"SpIEL cannot adapt {len(refused)} of the {len(names)} modules that 'all-linear' "
            f"stands for, and leaves them out: {shortened(refused)}",
            stacklevel=2,
        )
        names -= set(refused)
    config.target_modules = names  # type: ignore[assignment]


def warn_of_experts(model: nn.Module, total: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Warns where a good part of the model is in stacked weights of experts, which are no linear
    layers: a budget that is a share of all weights then falls to the few that are adapted.
    """
    stacked = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 2}
    share = sum(stacked.values()) / max(1, count_parameters(model))
    if share > NOTABLE_SHARE:
        targeted = sum(map(math.prod, shapes.values()))
        warnings.warn(
            f"{share:.0%} of the model's weights are in parameters of three or more dimensions, as "
            "those of fused experts are, which SpIEL does not adapt "
            f"({shortened(list(stacked), most=2)}): the budget of {total} deltas is "
            f"{total / targeted:.1%} of the weights that it adapts; give num_tunable_weights for "
            "another one",
            stacklevel=2,
        )


def _base_layer(module: nn.Module) -> Any:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_adaptable(module: nn.Module, name: str) -> bool:
    try:
        weight_shape(_base_layer(module), name)
    except TypeError:
        return False
    return True


def shortened(names: Sequence[str], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _is_in_layers(config: SpielConfig, name: str) -> bool:
    # peft asks for the layer of a module only where a target is the end of its name, not all of it.
    rule = copy.copy(config)
    rule.target_modules = [name.rpartition(".")[2]]
    return bool(check_target_module_exists(rule, f".{name}"))


def refuse_shared_weights(model: nn.Module, targets: Iterable[str]) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(_place(parameter), []).append(name)
    for name in targets:
        module = model.get_submodule(name)
        shared = users[_place(_base_layer(module).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"the weight of {name} is shared ({', '.join(shared)}), so its deltas would change "
                "the other module too; exclude it (exclude_modules) or untie the weights"
            )


def _place(parameter: torch.Tensor) -> int:
    """The same for parameters whose values stand in the same place in memory."""
    return parameter.data_ptr() or id(parameter)
