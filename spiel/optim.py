"""SpielAdamW, whose state follows each active weight through reselections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from spiel.adamw import MAX_AGE, advance, is_for_one_pass
from spiel.optimizer import SpielOptimizer
from spiel.reselection import Exchange
from spiel.state import check_state_dtype, fetch, store

#: So many entries are updated at once; their temporaries take up to 20 bytes each.
BUNCH = 2**21

#: The first and the second moment, as torch's own AdamW names them.
MOMENTS = ("exp_avg", "exp_avg_sq")


class SpielAdamW(SpielOptimizer):
    """AdamW with an age of its own for every active weight.

    With age a, counted from 1, and gradient g:
        m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        value -= lr m / ((sqrt(v) + eps) (1 - b1^a) / sqrt(1 - b2^a)),   value -= lr wd value
    which differs from `torch.optim.AdamW` in where eps stands and in the age. Weight decay pulls
    deltas to 0, and so weights to their pretrained values. Formula: the code of arXiv 2401.16405.

    State per weight: m and v, each of 4 bytes (`state_dtype` "float32"), 2 ("bfloat16") or 1 and
    1/64 ("8bit": blocks of 256 share a scale); and the age, one int16 for the whole parameter until
    a reselection makes ages differ, then one for each weight.

    Args:
        model_or_params: a model (its trainable parameters), parameters, or parameter groups.
        lr: learning rate.
        betas: b1 and b2, each in [0, 1).
        eps: added to sqrt(v) before bias correction.
        weight_decay: decoupled weight decay.
        state_dtype: how m and v are kept; they are fp32 while they are changed.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        state_dtype: str = "float32",
    ) -> None:
        check_state_dtype(state_dtype)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must each be in [0, 1), got {betas}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # Among the groups' values it is saved and copied with them.
        super().__init__(model_or_params, {**defaults, "state_dtype": state_dtype})

    @property
    def state_dtype(self) -> str:
        """How m and v are kept."""
        dtype: str = self.defaults["state_dtype"]
        return dtype

    def _check_loaded(self, state_dict: dict[str, Any]) -> None:
        super()._check_loaded(state_dict)
        saved = {group["state_dtype"] for group in state_dict["param_groups"]}
        if saved != {self.state_dtype}:
            raise ValueError(
                f"the state was saved with state_dtype {', '.join(sorted(saved))}, but this "
                f"SpielAdamW has {self.state_dtype}: make it with the state_dtype of the saved one"
            )

    def update(self, parameters: Sequence[torch.Tensor], group: dict[str, Any]) -> None:
        for some in _bunches(parameters):
            self._update_together(some, group)

    def _update_together(self, parameters: list[torch.Tensor], group: dict[str, Any]) -> None:
        """Updates parameters that are of one kind, as `_bunches` has them."""
        states = [self._state_of(parameter) for parameter in parameters]
        gradients = [p.grad.float() for p in parameters if p.grad is not None]
        m = [fetch(state, "exp_avg", self.state_dtype) for state in states]
        v = [fetch(state, "exp_avg_sq", self.state_dtype) for state in states]
        ages = [state["age"] for state in states]
        advance(parameters, gradients, m, v, ages, group)
        for state, own_m, own_v in zip(states, m, v, strict=True):
            store(state, "exp_avg", own_m, self.state_dtype)
            store(state, "exp_avg_sq", own_v, self.state_dtype)
        torch._foreach_clamp_max_(ages, MAX_AGE - 1)
        torch._foreach_add_(ages, 1)

    def _state_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            for name in MOMENTS:
                zeros = torch.zeros_like(parameter, dtype=torch.float32)
                store(state, name, zeros, self.state_dtype)
            state["age"] = torch.ones((), dtype=torch.int16, device="cpu")
            self.note_support(parameter)
        return state

    @torch.no_grad()
    def reselect(
        self,
        parameter: torch.Tensor,
        exchange: Exchange,
        gradient_mean: torch.Tensor,
        gradient_sq_mean: torch.Tensor,
        num_steps: int,
    ) -> None:
        """Moves the state of `parameter` to the support that its layer has now, and seeds it for
        grown weights.

        Args:
            gradient_mean: [m], mean gradient of each of `exchange.grown` over the steps seen.
            gradient_sq_mean: [m], mean squared gradient, likewise.
            num_steps: how many optimizer steps they were seen for: the age of grown weights.
        """
        state = self._state_of(parameter)
        seeds = (gradient_mean, gradient_sq_mean)
        for name, seed, beta in zip(
            MOMENTS, seeds, self._group_of(parameter)["betas"], strict=True
        ):
            moved = fetch(state, name, self.state_dtype).index_select(0, exchange.source)
            moved.index_copy_(0, exchange.grown, seed * (1 - beta**num_steps))
            store(state, name, moved, self.state_dtype)
        age = state["age"].to(parameter.device).expand(parameter.shape)
        state["age"] = age.index_select(0, exchange.source).index_fill_(
            0, exchange.grown, num_steps
        )
        self.note_support(parameter)

    def _group_of(self, parameter: torch.Tensor) -> dict[str, Any]:
        for group in self.param_groups:
            if any(parameter is member for member in group["params"]):
                return group
        raise ValueError("the optimizer does not have this parameter")


def check_state_moves(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> None:
    """Raises TypeError if an ordinary optimiser keeps state that `move_state` cannot move."""
    for name, value in _states_per_weight(optimizer, parameter):
        if value.shape != parameter.shape or not value.is_floating_point():
            raise TypeError(
                f"{type(optimizer).__name__} keeps {name!r} in a form that cannot follow a "
                "reselection (shape or dtype); use spiel.SpielAdamW"
            )


def move_state(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, change: Exchange) -> None:
    """Brings an ordinary optimiser's state per weight to a new support, 0 for grown weights."""
    for name, value in _states_per_weight(optimizer, parameter):
        optimizer.state[parameter][name] = change.move(value)


def _states_per_weight(
    optimizer: torch.optim.Optimizer, parameter: torch.Tensor
) -> list[tuple[str, torch.Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [(n, v) for n, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0]


#: What parameters that are updated together have in common: device, dtype, and by what.
_Kind = tuple[torch.device, torch.dtype, bool]


def _bunches(parameters: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Parameters of one kind, of which several have no more than BUNCH entries."""
    bunches: dict[_Kind, list[torch.Tensor]] = {}
    sizes: Counter[_Kind] = Counter()
    for parameter in parameters:
        kind = parameter.device, parameter.dtype, is_for_one_pass(parameter)
        if sizes[kind] and sizes[kind] + parameter.numel() > BUNCH:
            yield bunches.pop(kind)
            sizes[kind] = 0
        bunches.setdefault(kind, []).append(parameter)
        sizes[kind] += parameter.numel()
    yield from bunches.values()
