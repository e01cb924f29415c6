"""Reselector: drives the schedule over a model, one call after every optimizer step."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from spiel.checks import (
    check_layers,
    check_momenta,
    check_optimizer,
    check_state,
    check_unsharded,
    config_of,
)
from spiel.distributed import broadcast_, check_equal, is_parallel
from spiel.layer import SpielLinear
from spiel.model import spiel_layers
from spiel.ops.blocked import largest_products
from spiel.optim import SpielAdamW, move_state
from spiel.quorum import Quorum
from spiel.ranking import places
from spiel.reminder import reminder
from spiel.reselection import Exchange, Schedule, drop, exchange, grow_by_gradients
from spiel.sm3 import SpielSM3
from spiel.support import Seen
from spiel.targets import shortened
from spiel.window import GradientWindow, end_step, measure_scale


class Reselector:
    """Drops and grows the deltas of a model's active SpIEL adapter.

    Use: `optimizer.step(); optimizer.zero_grad(); reselector.step()`. Make it before training, so
    that the first growth window sees the first backward pass.

    Args:
        model: a model with a SpIEL adapter (`peft.get_peft_model`).
        optimizer: has the adapter's deltas. Growth "ma" needs SpielSM3; growth "ag" is made for
            SpielAdamW, and takes any optimiser whose state per weight has the parameter's shape:
            grown weights then start from a state of 0.
        total_steps: length of training in optimizer steps, however many backward passes each has.
        adapter: which adapter, where several are active.

    Raises:
        ValueError: `total_steps` is too small for one reselection, the adapter is frozen, the
            optimizer does not have the deltas, or ranks hold parts of weights.
        TypeError: the optimizer cannot serve this growth, or `total_steps` is no integer.
        RuntimeError: adapters are merged, or the optimizer's state is of another support.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total_steps: int,
        adapter: str | None = None,
    ) -> None:
        self.adapter, self.layers = spiel_layers(model, adapter)
        config = config_of(model, self.adapter)
        self.growth: str = config.growth
        self.schedule = Schedule(
            total_steps,
            config.reselection_steps,
            config.selection_accumulation_steps,
            config.initial_reselection_rate,
            config.reselection_rate_policy,
        )
        self.optimizer: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        check_unsharded(model, self.layers, self.adapter)
        check_layers(self.layers, self.adapter)
        check_optimizer(self.optimizer, self.layers, self.adapter, self.growth)
        self.t = 0
        self.windows: dict[str, GradientWindow] = {}
        self._scale = 1.0
        self._optimizer_steps = self._steps_under_way = 0
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        self._share_support()
        self._seen = Seen(())
        self._check_supports()
        deltas = [layer.spiel_deltas[self.adapter] for layer in self.layers.values()]
        #: Nothing was learned before, so the first reselection may replace everything.
        self.is_random = not any(bool(values.any()) for values in deltas)
        self._open_windows()
        reminder.forget()

    # -- the interface ----------------------------------------------------------------------

    def step(self) -> None:
        """Call once after every `optimizer.step()`.

        Raises:
            RuntimeError: the optimizer has not stepped since the last call, or more than once.
        """
        if self._optimizer_steps != 1:
            raise RuntimeError(
                f"reselector.step() must follow each optimizer.step(); there were "
                f"{self._optimizer_steps} optimizer steps since the last call"
            )
        self._optimizer_steps = self._steps_under_way = 0
        self.t += 1
        end_step(list(self.windows.values()), self._scale)
        if self.t == 1 or self.schedule.reselects(self.t):
            check_state(self.optimizer, self.layers, self.adapter)
        if self.schedule.reselects(self.t):
            self._reselect()
            self._seen = Seen(self._supports())
            self._close_windows()
        if self.schedule.opens_window(self.t):
            self._open_windows()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs beside the model's and the optimizer's state."""
        windows = {name: window.state_dict() for name, window in self.windows.items()}
        return {"t": self.t, "is_random": self.is_random, "windows": windows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken. Load the model and the optimizer too.

        Raises:
            ValueError: the state is of a model with other modules.
        """
        unknown = set(state["windows"]) - set(self.layers)
        if unknown:
            raise ValueError(f"the state has windows of unknown modules: {', '.join(unknown)}")
        self.t, self.is_random = state["t"], state["is_random"]
        self._close_windows()
        if state["windows"]:
            self._open_windows()
        for name, saved in state["windows"].items():
            self.windows[name].load_state_dict(saved)

    def close(self) -> None:
        """Lets go of model and optimizer."""
        self._close_windows()
        for hook in self._hooks:
            hook.remove()

    def skip_step(self) -> None:
        """Call in place of `step` when the optimizer was not stepped, as a GradScaler does after
        an overflow: the gradients of these micro-batches are forgotten.
        """
        for window in self.windows.values():
            window.skip_step()

    # -- parts of a step --------------------------------------------------------------------

    # A step that calls that of its base class is announced for each of them; it is one step.

    def _before_step(self, *_: Any) -> None:
        self._steps_under_way += 1
        if self._steps_under_way == 1:
            self._check_supports()
            self._measure_scale()

    def _measure_scale(self) -> None:
        scale = measure_scale(list(self.windows.values()), self._scale)
        if math.isfinite(scale):
            self._scale = scale
            return
        self.skip_step()
        warnings.warn(
            "a backward pass whose gradient was not finite never reached the optimizer as it was; "
            "growth leaves out all that was gathered since the last step: call "
            "reselector.skip_step() along with zero_grad(), so that only that pass is forgotten",
            stacklevel=2,
        )

    def _after_step(self, *_: Any) -> None:
        self._steps_under_way -= 1
        if self._steps_under_way == 0:
            self._optimizer_steps += 1

    @property
    def optimizer_has_stepped(self) -> bool:
        """Whether there was an optimizer step that `step` has not been called for."""
        return self._optimizer_steps > 0

    def _share_support(self) -> None:
        """Gives all data-parallel ranks the support and the deltas of rank 0."""
        if not is_parallel():
            return
        for layer in self.layers.values():
            indices = layer.spiel_indices[self.adapter].clone()
            deltas = layer.spiel_deltas[self.adapter].detach().clone()
            broadcast_(indices)
            broadcast_(deltas)
            layer.replace_support(self.adapter, indices, deltas)

    def _check_supports(self) -> None:
        """Looks whether the optimizer's state is of these supports, if they are not the ones that
        were here before.
        """
        supports = self._supports()
        if not self._seen.is_of(supports):
            check_momenta(self.optimizer, self.layers, self.adapter)
            self._seen = Seen(supports)

    def _supports(self) -> list[torch.Tensor]:
        return [layer.spiel_indices[self.adapter] for layer in self.layers.values()]

    def _check_agreement(self) -> None:
        if not is_parallel():
            return
        sums = torch.stack([support.sum() for support in self._supports()])
        check_equal(sums, "the supports that reselection chose")

    def _open_windows(self) -> None:
        if self.growth == "ma":
            return  # the optimizer's accumulators watch at all times
        quorum = Quorum(self.windows.values())
        for name, layer in self.layers.items():
            deltas = layer.spiel_deltas[self.adapter]
            if len(deltas) > 0:
                self.windows[name] = GradientWindow(deltas, quorum)
                layer.observers[self.adapter] = self.windows[name]

    def _close_windows(self) -> None:
        for layer in self.layers.values():
            layer.observers.pop(self.adapter, None)
        self.windows.clear()

    def _reselect(self) -> None:
        rate = self.schedule.rate(self.t, self.is_random)
        unused = self._unused()
        for name, layer in self.layers.items():
            n = int(len(layer.spiel_deltas[self.adapter]) * rate)
            if n == 0 or name in unused:
                continue
            if isinstance(self.optimizer, SpielSM3):
                self._reselect_by_momenta(layer, n)
            else:
                self._reselect_by_gradients(layer, self.windows[name], n)
        self._check_agreement()

    def _unused(self) -> list[str]:
        """The modules without a gradient, in the growth window (AG) or ever (MA), which stay as
        they are. Warns of them at the first reselection.
        """
        if isinstance(self.optimizer, SpielSM3):
            deltas = {name: layer.spiel_deltas[self.adapter] for name, layer in self.layers.items()}
            unused = [n for n, own in deltas.items() if self.optimizer.momenta(own) is None]
        else:
            unused = [name for name, window in self.windows.items() if window.num_steps == 0]
        if unused and self.t == self.schedule.selection_accumulation_steps:
            warnings.warn(
                f"no gradient reached the deltas of {len(unused)} of {len(self.layers)} modules in "
                f"the first {self.t} steps, and they stay as they are: {shortened(unused)}. Such a "
                "module was never called, or the model reads its weight without calling it",
                stacklevel=2,
            )
        return unused

    def _reselect_by_gradients(self, layer: SpielLinear, window: GradientWindow, n: int) -> None:
        """Exchanges `n` deltas of a layer for the candidates that the window found (AG)."""
        candidates, sums, squares = window.candidates, window.sums, window.squares
        assert candidates is not None and sums is not None and squares is not None
        deltas, indices = layer.spiel_deltas[self.adapter], layer.spiel_indices[self.adapter]
        slots, entering = grow_by_gradients(candidates, sums, indices, deltas, n)
        change = self._exchange(layer, slots, candidates.index_select(0, entering))
        if isinstance(self.optimizer, SpielAdamW):
            mean, sq_mean = (
                own.index_select(0, entering) / window.num_steps for own in (sums, squares)
            )
            self.optimizer.reselect(deltas, change, mean, sq_mean, window.num_steps)
        else:
            move_state(self.optimizer, deltas, change)

    def _reselect_by_momenta(self, layer: SpielLinear, n: int) -> None:
        """Exchanges `n` deltas of a layer for the inactive weights of largest momenta (MA)."""
        assert isinstance(self.optimizer, SpielSM3)
        deltas, indices = layer.spiel_deltas[self.adapter], layer.spiel_indices[self.adapter]
        momenta = self.optimizer.momenta(deltas)
        assert momenta is not None  # see `_unused`
        grown = largest_products(*momenta, n, exclude=indices)
        slots = places(drop(deltas, len(grown)))
        change = self._exchange(layer, slots, grown)
        self.optimizer.reselect(deltas, change)

    def _exchange(
        self, layer: SpielLinear, slots: torch.Tensor, entering: torch.Tensor
    ) -> Exchange:
        change = exchange(layer.spiel_indices[self.adapter], slots, entering)
        moved = change.move(layer.spiel_deltas[self.adapter].detach())
        layer.replace_support(self.adapter, change.indices, moved)
        return change
