"""SpielModel: finds the linear modules of a model, shares out the budget, and adapts them."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from spiel.config import DEFAULT_DENSITY, SpielConfig
from spiel.layer import SpielLinear, weight_shape
from spiel.quantized import SpielLinear4bit, is_4bit


class SpielModel(BaseTuner):
    """SpIEL on a pretrained model, as a peft tuner; made by `peft.get_peft_model`.

    Raises:
        ValueError: the budget is larger than the targeted weights, no module is targeted, or a
            targeted weight is shared with another module.
        TypeError: a targeted module is not linear.
    """

    prefix = "spiel_"
    tuner_layer_cls = SpielLinear
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (peft's own declaration)

    def _prepare_adapter_config(self, peft_config: Any, _: dict) -> SpielConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Fills `num_deltas` and `weight_shapes`, or checks the ones that were saved."""
        if peft_config.target_modules == "all-linear":
            _maybe_include_all_linear_layers(peft_config, model)
            _narrow_all_linear(peft_config, model)
        shapes = self._targeted_shapes(peft_config, model)
        if not shapes:
            return  # peft's own message says which names matched nothing
        _refuse_shared_weights(model, shapes)
        if peft_config.num_deltas is None:
            total = _total_deltas(peft_config, count_parameters(model))
            peft_config.num_deltas = share_out(total, shapes)
        else:
            _check_saved(peft_config, shapes)
        peft_config.weight_shapes = {name: list(shape) for name, shape in shapes.items()}

    def _targeted_shapes(self, config: SpielConfig, model: nn.Module) -> dict[str, tuple[int, int]]:
        shapes = {}
        inner: tuple[str, ...] = ()  # what is inside an adapted layer is no module of the model
        for name, module in model.named_modules():
            if not name or name.startswith(inner):
                continue
            if isinstance(module, BaseTunerLayer):
                inner += (f"{name}.",)
            if self._check_target_module_exists(config, name):
                layer = module.get_base_layer() if isinstance(module, SpielLinear) else module
                shapes[name] = weight_shape(layer, name)
        return shapes

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        k = peft_config.num_deltas[current_key]
        dtype = getattr(torch, peft_config.delta_dtype)
        if isinstance(target, SpielLinear):
            target.update_layer(adapter_name, k, dtype)
            return
        layer_class = SpielLinear4bit if is_4bit(target) else SpielLinear
        layer = layer_class(target, current_key)
        layer.set_adapter(self.active_adapters)
        layer.update_layer(adapter_name, k, dtype)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Leaves the deltas alone: their dtype is the config's `delta_dtype`. Called by peft."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """What peft enters around every forward pass of a PeftModel.

        Raises:
            ValueError: an adapter is named for each sample.
        """
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "SpIEL cannot mix adapters within a batch (adapter_names), as a weight holds one "
                "set of deltas at a time: use set_adapter and one batch for each adapter"
            )
        yield

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        # DistributedDataParallel would overwrite supports in place at every forward pass; the
        # Reselector keeps them equal on all ranks. Names as seen from the PeftModel around this.
        names = (f"base_model.{name}" for name, _ in self.named_buffers())
        return [name for name in names if ".spiel_indices." in name]


def spiel_layers(
    model: nn.Module, adapter: str | None = None
) -> tuple[str, dict[str, SpielLinear]]:
    """An adapter's name (None: the active one) and its layers, by module name in the base model.

    Raises:
        ValueError: the model has no such adapter, or none was named and several are active.
    """
    layers = [module for module in model.modules() if isinstance(module, SpielLinear)]
    known = sorted({name for layer in layers for name in layer.spiel_deltas})
    if adapter is None:
        active = sorted({name for layer in layers for name in layer.active_adapters} & set(known))
        if len(active) > 1:
            raise ValueError(f"several adapters are active ({', '.join(active)}): name one")
        adapter = active[0] if active else None
    if adapter not in known:
        what = "active SpIEL adapter" if adapter is None else f"SpIEL adapter {adapter!r}"
        raise ValueError(f"the model has no {what}; it has: {', '.join(known) or 'none'}")
    return adapter, {layer.name: layer for layer in layers if adapter in layer.spiel_deltas}


def get_deltas(
    model: nn.Module, adapter: str | None = None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each module's (flat indices [k] sorted, delta values [k]), by its name in the base model.

    Copies, so that they do not change as training goes on.
    """
    adapter, layers = spiel_layers(model, adapter)
    return {
        name: (layer.spiel_indices[adapter].clone(), layer.spiel_deltas[adapter].detach().clone())
        for name, layer in layers.items()
    }


def set_support(
    model: nn.Module, support: Mapping[str, torch.Tensor], adapter: str | None = None
) -> None:
    """Gives modules new flat indices; their delta values restart at 0.

    Raises:
        ValueError: a module is unknown, or its indices are out of range, duplicated, unsorted, or
            not as many as the adapter has deltas there.
    """
    adapter, layers = spiel_layers(model, adapter)
    unknown = [name for name in support if name not in layers]
    if unknown:
        raise ValueError(f"no SpIEL module {unknown[0]!r}; there are {', '.join(layers)}")
    for name, indices in support.items():
        layers[name].set_support(adapter, indices)


def count_parameters(model: nn.Module) -> int:
    """All parameters of the base model, those of earlier injections not counted.

    A weight packed into 4 bits counts as the weight it stands for.
    """
    added = (".spiel_deltas.", ".modules_to_save.")
    own = (p for name, p in model.named_parameters() if not any(part in name for part in added))
    packed = ((p, getattr(p, "quant_state", None)) for p in own)
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in packed)


def share_out(total: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Spreads `total` deltas over weights in proportion to size: int(total x numel / sum).

    Raises:
        ValueError: there are fewer weights than that, or so few deltas that no weight gets one.
    """
    numels = {name: rows * cols for name, (rows, cols) in shapes.items()}
    all_numel = sum(numels.values())
    if total > all_numel:
        raise ValueError(
            f"the budget of {total} deltas is more than the {all_numel} targeted weights; lower "
            "density or num_tunable_weights, or target more modules"
        )
    shares = {name: int(total * numel / all_numel) for name, numel in numels.items()}
    if not any(shares.values()):
        raise ValueError(
            f"the budget of {total} deltas is too small to be spread over {len(shares)} weights; "
            "raise density or num_tunable_weights"
        )
    return shares


def _total_deltas(config: SpielConfig, num_parameters: int) -> int:
    if config.num_tunable_weights is not None:
        return config.num_tunable_weights
    if config.density is None:
        config.density = DEFAULT_DENSITY
    return int(config.density * num_parameters)


def _narrow_all_linear(config: SpielConfig, model: nn.Module) -> None:
    """Leaves out of the full names that "all-linear" stood for what peft leaves in: the copies of
    other adapters' `modules_to_save`, and layers that are not in `layers_to_transform`.
    """
    wrappers = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    inside = tuple(f"{name}." for name in wrappers)
    names = {name for name in config.target_modules or () if not name.startswith(inside)}
    if config.layers_to_transform is not None:
        names = {name for name in names if _is_in_layers(config, name)}
        if not names:
            raise ValueError(f"no layer is one of layers_to_transform {config.layers_to_transform}")
    config.target_modules = names  # type: ignore[assignment]


def _is_in_layers(config: SpielConfig, name: str) -> bool:
    # peft asks for the layer of a module only where a target is the end of its name, not all of it.
    rule = copy.copy(config)
    rule.target_modules = [name.rpartition(".")[2]]
    return bool(check_target_module_exists(rule, f".{name}"))


def _refuse_shared_weights(model: nn.Module, targets: Mapping[str, Any]) -> None:
    users: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        users.setdefault(_place(parameter), []).append(name)
    for name in targets:
        module = model.get_submodule(name)
        layer = module.get_base_layer() if isinstance(module, SpielLinear) else module
        shared = users[_place(layer.weight)]  # type: ignore[arg-type]
        if len(shared) > 1:
            raise ValueError(
                f"the weight of {name} is shared ({', '.join(shared)}), so its deltas would change "
                "the other module too; exclude it (exclude_modules) or untie the weights"
            )


def _place(parameter: torch.Tensor) -> int:
    """The same for parameters whose values stand in the same place in memory."""
    return parameter.data_ptr() or id(parameter)


def _check_saved(config: SpielConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    assert config.num_deltas is not None
    for name in config.num_deltas:
        if name not in shapes:
            raise ValueError(
                f"num_deltas names {name}, which is no targeted module of this model: it must be "
                "the base model that the adapter was made for"
            )
    for name, shape in shapes.items():
        if name not in config.num_deltas:
            raise ValueError(f"num_deltas says nothing of the targeted module {name}")
        saved = (config.weight_shapes or {}).get(name, list(shape))
        if tuple(saved) != shape:
            raise ValueError(
                f"{name}: the adapter was made for a weight of shape {tuple(saved)}, "
                f"this model's has {shape}"
            )
        if not 0 <= config.num_deltas[name] <= shape[0] * shape[1]:
            raise ValueError(
                f"{name}: num_deltas {config.num_deltas[name]} is not between 0 and the weight's "
                f"{shape[0] * shape[1]} entries"
            )
