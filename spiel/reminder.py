"""Tells once, who trains deltas that no Reselector moves, that they stay where they are."""

from __future__ import annotations

import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from spiel.delta_layer import layer_of


class _Reminder:
    """Watches the steps of all optimizers, from the first adapter that wants reselections until a
    Reselector is made; after its warning it does not look any longer.
    """

    def __init__(self) -> None:
        self._num_steps: WeakKeyDictionary[torch.optim.Optimizer, int] = WeakKeyDictionary()
        self._patience = 0
        self._hook: RemovableHandle | None = None
        self._is_known = False

    def expect(self, num_steps: int) -> None:
        """An adapter was made that is to be reselected every `num_steps`."""
        self._patience = num_steps
        if not self._is_known and self._hook is None:
            self._hook = register_optimizer_step_post_hook(self._count)

    def forget(self) -> None:
        """There is a Reselector, so they are known."""
        self._is_known = True
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if self._is_known or all(layer_of(parameter) is None for parameter in parameters):
            return
        self._num_steps[optimizer] = num_steps = self._num_steps.get(optimizer, 0) + 1
        if num_steps > self._patience:
            self._is_known = True  # the hook stays: torch goes through all of them just now
            warnings.warn(
                f"SpIEL's deltas have taken {num_steps} optimizer steps, and no Reselector "
                "moves them: they stay where they were drawn at random. Give the Trainer "
                "callbacks=[spiel.SpielCallback()], or make a spiel.Reselector before training; "
                "initial_reselection_rate=0 says that they shall stay",
                stacklevel=2,
            )


reminder = _Reminder()
