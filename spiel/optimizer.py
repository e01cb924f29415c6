"""SpielOptimizer: what SpielAdamW and SpielSM3 share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from spiel.delta_layer import DeltaLayer, layer_of

#: Under this name the state of deltas tells of which support it is: the sum of its indices.
_SUPPORT = "support_sum"


class SpielOptimizer(torch.optim.Optimizer):
    """What SpIEL's optimisers share: what they optimise, the loop of a step, and the state of the
    Reselector, which travels in their state dict where Trainer's checkpoints keep it.

    Args:
        model_or_params: a model (its trainable parameters), parameters, or parameter groups.
        defaults: values of each group; all but betas must not be negative.
    """

    def __init__(
        self, model_or_params: nn.Module | Iterable[Any], defaults: dict[str, Any]
    ) -> None:
        for name in ("lr", "eps", "weight_decay"):
            if defaults[name] < 0:
                raise ValueError(f"{name} must not be negative, got {defaults[name]}")
        if isinstance(model_or_params, nn.Module):
            model_or_params = [p for p in model_or_params.parameters() if p.requires_grad]
            if not model_or_params:
                raise ValueError(
                    "the model has no parameter to train: load its adapter with is_trainable=True, "
                    "or activate it with set_adapter"
                )
        super().__init__(model_or_params, defaults)
        #: Gives the Reselector's state to `state_dict`; set by whoever wants it saved here.
        self.reselector_state: Callable[[], dict[str, Any]] | None = None
        #: The Reselector's state that came with `load_state_dict`.
        self.loaded_reselector_state: dict[str, Any] | None = None

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self.update([p for p in group["params"] if p.grad is not None], group)
        return loss

    def update(self, parameters: Sequence[torch.Tensor], group: dict[str, Any]) -> None:
        """Changes the parameters by their gradients."""
        raise NotImplementedError

    def note_support(self, parameter: torch.Tensor) -> None:
        """Keeps in the state of `parameter`, if it holds deltas, of which support that state is."""
        found = layer_of(parameter)
        if found is not None:
            self.state[parameter][_SUPPORT] = _support_sum(*found).cpu()

    def is_of_support(self, layer: DeltaLayer, adapter: str) -> bool:
        """Whether the state of these deltas is of the support they have, as far as it was noted."""
        noted = self.state.get(layer.spiel_deltas[adapter], {}).get(_SUPPORT)
        return noted is None or int(noted) == int(_support_sum(layer, adapter))

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().state_dict()
        if self.reselector_state is not None:
            state["reselector"] = self.reselector_state()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave, every tensor in the dtype it was saved in.

        torch's own loading casts state to the parameters' dtype, integers included.

        Raises:
            ValueError: it is the state of another kind of optimizer.
        """
        self._check_loaded(state_dict)
        state_dict = dict(state_dict)
        self.loaded_reselector_state = state_dict.pop("reselector", None)
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):
                    device = parameter.device if value.dim() > 0 else "cpu"
                    self.state[parameter][name] = value.detach().to(device, copy=True)

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        names = set(self.defaults) - {"differentiable"}  # torch's own, which no group has
        for group in state_dict["param_groups"]:
            missing = sorted(names - set(group))
            if missing:
                raise ValueError(
                    f"the state is of another optimizer: it lacks {', '.join(missing)}; "
                    f"load what a {type(self).__name__} saved"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # torch copies, pickles and loads nothing but its own attributes.
        super().__setstate__(state)
        self.__dict__.setdefault("reselector_state", None)
        self.__dict__.setdefault("loaded_reselector_state", None)


def _support_sum(layer: DeltaLayer, adapter: str) -> torch.Tensor:
    return layer.spiel_indices[adapter].sum()
