"""SpielModel: finds the linear modules of a model, shares out the budget, and adapts them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
)
from torch import nn

from spiel.budget import check_saved, count_parameters, share_out, total_deltas
from spiel.config import SpielConfig
from spiel.delta_layer import prepared
from spiel.layer import SpielLinear
from spiel.quantized import SpielLinear4bit, is_4bit
from spiel.reminder import reminder
from spiel.targets import (
    narrow_all_linear,
    refuse_shared_weights,
    warn_of_experts,
    weight_shape,
)

#: Task -> the names of heads that peft trains in full, as `PeftModelFor...` adds them to the
#: config after the adapter is in place.
_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

#: What TRL's trainers (DPO, GRPO, KTO, RLOO) call the copy that they make of an adapter, with its
#: very config, to train away from: they copy parameters by names as LoRA has them, and no supports.
REFERENCE = "ref"


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

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """What peft calls for every adapter that is made or loaded."""
        # What injection fills in is of this model: the caller may use the config for another.
        given = self.peft_config[adapter_name]
        config: Any = copy.deepcopy(given)
        self.peft_config[adapter_name] = config
        saved = list(config.modules_to_save or ())
        heads = [name for name in _HEADS.get(config.task_type, ()) if name not in saved]
        config.modules_to_save = [*saved, *heads] or None
        found = super().inject_adapter(model, adapter_name, *args, **kwargs)
        if config.initial_reselection_rate > 0 and not config.inference_mode:
            reminder.expect(config.reselection_steps)
        originals = [name for name, each in self.peft_config.items() if each is given]
        if adapter_name == REFERENCE and originals:
            self._copy_adapter(originals[0], adapter_name)
        return found

    def _copy_adapter(self, source: str, target: str) -> None:
        """Gives the adapter `target` the supports and the deltas of `source`."""
        for layer in self.model.modules():
            if isinstance(layer, SpielLinear) and source in layer.spiel_deltas:
                indices, deltas = layer.spiel_indices[source], layer.spiel_deltas[source]
                layer.replace_support(target, indices.clone(), deltas.detach().clone())

    def _prepare_adapter_config(self, peft_config: Any, _: dict) -> SpielConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        elif not peft_config.target_modules:
            raise ValueError(
                f"target_modules {peft_config.target_modules!r} names no module; leave it out for "
                "all linear ones"
            )
        return peft_config

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Fills `num_deltas` and `weight_shapes`, or checks the ones that were saved."""
        is_all_linear = peft_config.target_modules == "all-linear"
        if is_all_linear:
            _maybe_include_all_linear_layers(peft_config, model)
            narrow_all_linear(peft_config, model)
        shapes = self._targeted_shapes(peft_config, model)
        if not shapes:
            return  # peft's own message says which names matched nothing
        refuse_shared_weights(model, shapes)
        if peft_config.num_deltas is None:
            total = total_deltas(peft_config, count_parameters(model))
            peft_config.num_deltas = share_out(total, shapes)
            if is_all_linear and peft_config.num_tunable_weights is None:
                warn_of_experts(model, total, shapes)
        else:
            check_saved(peft_config, shapes)
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

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Called by peft, which on unloading would also copy a weight that a head need not have."""
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            setattr(parent, child_name, new_module)

    def _check_merge_allowed(self) -> None:
        """What peft asks before it merges the first layer.

        Raises:
            ValueError: a layer cannot be merged.
        """
        super()._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, SpielLinear4bit):
                module.refuse_merging()

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
        if torch.compiler.is_compiling():  # what is written into weights must not be traced
            yield
            return
        with prepared(m for m in self.model.modules() if isinstance(m, SpielLinear)):
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
        ValueError: the model has no such adapter, none was named and several are active, or two
            adapted models with layers of the same names are in it.
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
    own = [layer for layer in layers if adapter in layer.spiel_deltas]
    by_name = {layer.name: layer for layer in own}
    if len(by_name) < len(own):
        raise ValueError(
            f"{len(own)} layers have {len(by_name)} names, as where a model holds several adapted "
            "models: pass these one by one, with a Reselector for each"
        )
    return adapter, by_name


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

    Use it before the optimizer is made: an optimizer's state is of the weights that it has seen,
    so after a step it would go on with the momenta of weights that are no longer active.

    Raises:
        ValueError: a module is unknown, or its indices are out of range, duplicated, unsorted, or
            not as many as the adapter has deltas there.
        TypeError: indices are no tensor.
        RuntimeError: adapters are merged.
        Nothing was changed.
    """
    adapter, layers = spiel_layers(model, adapter)
    unknown = [name for name in support if name not in layers]
    if unknown:
        raise ValueError(f"no SpIEL module {unknown[0]!r}; there are {', '.join(layers)}")
    for name, indices in support.items():
        layers[name].check_support(adapter, indices)
    for name, indices in support.items():
        layers[name].set_support(adapter, indices)
