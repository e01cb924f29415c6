"""SpielCallback: reselection inside transformers' Trainer, checkpoints and resuming included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spiel.optim import SpielOptimizer
from spiel.reselector import Reselector


class SpielCallback(TrainerCallback):
    """Reselects after each optimizer step of a Trainer.

    With SpielAdamW or SpielSM3 the state of the reselection travels in the optimizer's state
    dict, so a run goes on from a Trainer checkpoint as if it had never stopped.
    """

    def __init__(self) -> None:
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
        reselector = Reselector(model, optimizer, state.max_steps, args.gradient_accumulation_steps)
        inner = reselector.optimizer
        saved = inner.loaded_reselector_state if isinstance(inner, SpielOptimizer) else None
        if saved is not None:
            reselector.load_state_dict(saved)
        if reselector.t != state.global_step:
            raise ValueError(
                f"training resumes at step {state.global_step}, but the state of the reselection "
                f"is of step {reselector.t}: resume from a checkpoint that was saved with "
                "SpielCallback and with SpielAdamW or SpielSM3"
            )
        if isinstance(inner, SpielOptimizer):
            inner.reselector_state = reselector.state_dict
            inner.loaded_reselector_state = None
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
