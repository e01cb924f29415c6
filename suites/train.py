"""One fit() for every method, on transformers.Trainer; nothing here knows which method it is."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from suites.measure import StepMeter
from suites.methods import Contestant
from suites.suite import Recipe, Tuning


class DivergedError(ArithmeticError):
    """The loss is no longer a finite number; the message says at which step."""


class LossWatch(TrainerCallback):
    """Keeps the loss of every step, tells `on_step(step, loss)`, and stops at a NaN or inf."""

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self.on_step = on_step
        self.losses: list[float] = []

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return  # the summary after the last step
        if not math.isfinite(logs["loss"]):
            raise DivergedError(f"the loss is {logs['loss']} at step {state.global_step}")
        self.losses.append(logs["loss"])
        self.on_step(state.global_step, logs["loss"])


def fit(
    contestant: Contestant,
    examples: Any,
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    recipe: Recipe,
    tuning: Tuning,
    seed: int,
    device: str,
    meter: StepMeter,
    watch: LossWatch,
) -> tuple[torch.optim.Optimizer, int]:
    """Trains `contestant.model` in place; returns its optimiser and the number of tokens seen.

    The order of the examples depends on `seed` alone, so it is the same for all methods.
    Raises DivergedError as soon as a loss is not finite.
    """
    optimizer = contestant.optimizer(tuning.lr, tuning.weight_decay)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=contestant.model,
            args=arguments(recipe, seed, device, folder),
            train_dataset=examples,
            data_collator=collate,
            optimizers=(optimizer, None),
            callbacks=[meter.opening, *contestant.callbacks, meter.closing, watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return optimizer, int(trainer.state.num_input_tokens_seen)


def arguments(recipe: Recipe, seed: int, device: str, folder: str) -> TrainingArguments:
    """The recipe in the Trainer's own words."""
    return TrainingArguments(
        output_dir=folder,
        max_steps=recipe.num_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,  # below 1 the Trainer takes it as a share of all steps
        max_grad_norm=recipe.max_grad_norm,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,  # the collator knows which fields it takes
        use_cpu=device == "cpu",
        include_num_input_tokens_seen="non_padding",
        # Every loss is logged as it is: a NaN that the Trainer averages away would go unseen.
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
