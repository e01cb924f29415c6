"""SpielCallback: reselection inside transformers' Trainer, checkpoints and resuming included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spiel.optimizer import SpielOptimizer
from spiel.reselector import Reselector


class SpielCallback(TrainerCallback):
    """Reselects after each optimizer step of a Trainer.

    With SpielAdamW or SpielSM3 the state of the reselection travels in the optimizer's state
    dict, so a run goes on from a Trainer checkpoint as if it had never stopped.

    Args:
        adapter: which adapter, where several are active.
    """

    def __init__(self, adapter: str | None = None) -> None:
        self.adapter = adapter
        self.reselector: Reselector | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None and optimizer is not None
        if self.reselector is not None:
            self.reselector.close()
        reselector = Reselector(model, optimizer, state.max_steps, self.adapter)
        inner = reselector.optimizer
        if state.global_step > 0:
            reselector.load_state_dict(_state_of_step(inner, state.global_step))
        if isinstance(inner, SpielOptimizer):
            inner.loaded_reselector_state = None
            # fp16 training skips steps, so that these may be fewer than Trainer counts.
            inner.reselector_state = lambda: {
                **reselector.state_dict(),
                "global_step": state.global_step,
            }
        self.reselector = reselector

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.reselector is not None
        if self.reselector.optimizer_has_stepped:
            self.reselector.step()
        else:  # fp16 training lets the optimizer skip a step that overflowed
            self.reselector.skip_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.reselector is not None:
            self.reselector.close()
            if isinstance(self.reselector.optimizer, SpielOptimizer):
                self.reselector.optimizer.reselector_state = None
            self.reselector = None


def _state_of_step(optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    """The state of the reselection that was loaded with the optimizer.

    Raises:
        ValueError: there is none, or it is of another step.
    """
    state: dict[str, Any] | None = getattr(optimizer, "loaded_reselector_state", None)
    if state is None or state.get("global_step") != step:
        found = "none of the reselection"
        if state is not None:
            found = f"that of the reselection at step {state.get('global_step')}"
        raise ValueError(
            f"training resumes at step {step}, but the state that was loaded is {found}. Was the "
            "checkpoint saved without the optimizer (save_only_model=True), with another than "
            "SpielAdamW or SpielSM3, or without SpielCallback? Resume from another one, or train "
            "its adapter anew: PeftModel.from_pretrained(base, checkpoint, is_trainable=True)"
        )
    return state
