"""One fit() for every method, on transformers.Trainer; nothing here knows which method it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from suites.checkpoint import Checkpoints
from suites.distributed import share
from suites.methods import Contestant
from suites.steps import StepMeter
from suites.suite import Recipe, Tuning
from suites.values import hashed_values


class DivergedError(ArithmeticError):
    """The loss or a score is not a finite number; the message says where."""


class LossWatch(TrainerCallback):
    """Keeps the loss of every step, tells `on_step(step, loss)`, and stops at a NaN or inf."""

    def __init__(self, on_step: Callable[[int, float], None]) -> None:
        self.on_step = on_step
        self.losses: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # After a checkpoint, those of the steps before it.
        self.losses = [entry["loss"] for entry in state.log_history if "loss" in entry]

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:
            return  # the summary after the last step
        if not math.isfinite(logs["loss"]):
            raise DivergedError(f"the loss is {logs['loss']} at step {state.global_step}")
        self.losses.append(logs["loss"])
        self.on_step(state.global_step, logs["loss"])


@dataclass(frozen=True)
class Setup:
    """What `fit` has to know beside the contestant and the data."""

    recipe: Recipe
    tuning: Tuning
    seed: int
    device: str
    #: Data-parallel processes, of which this is one; they share the recipe's batch.
    num_ranks: int
    #: Where checkpoints go and come from.
    checkpoints: Checkpoints


class _Trainer(Trainer):
    """A Trainer that a checkpoint that cannot be written (a full disk, a quota) does not end, and
    that counts tokens without waiting for the device in each micro-batch.
    """

    checkpoints: Checkpoints
    _num_new_tokens: torch.Tensor | int = 0

    def _track_num_input_tokens(self, inputs: dict[str, torch.Tensor]) -> None:
        self._num_new_tokens = self._num_new_tokens + inputs["attention_mask"].sum()

    def count_tokens(self) -> int:
        """All tokens so far that are no padding, of all ranks."""
        new = torch.as_tensor(self._num_new_tokens, device=self.args.device)
        self.state.num_input_tokens_seen += int(self.accelerator.gather(new).sum())
        self._num_new_tokens = 0
        return int(self.state.num_input_tokens_seen)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.count_tokens()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except Exception as error:  # of the system, torch, or safetensors
            if self.args.world_size > 1:  # the others would not know
                raise
            self.checkpoints.give_up(self.state.global_step, error)


def fit(
    contestant: Contestant,
    examples: Any,
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]],
    setup: Setup,
    meter: StepMeter,
    watch: LossWatch,
) -> tuple[torch.optim.Optimizer, int]:
    """Trains `contestant.model` in place; returns its optimiser and the number of tokens seen.

    The order of the examples depends on the seed alone, so it is the same for all methods. Goes
    on from the newest checkpoint, if there is one. Raises DivergedError as soon as a loss is not
    finite.
    """
    optimizer = contestant.optimizer(setup.tuning.lr, setup.tuning.weight_decay)
    checkpoints = setup.checkpoints
    trainer = _Trainer(
        model=contestant.model,
        args=arguments(setup),
        train_dataset=examples,
        data_collator=collate,
        optimizers=(optimizer, None),
        callbacks=[meter.opening, *contestant.callbacks, meter.closing, watch, checkpoints],
    )
    trainer.checkpoints = checkpoints
    trainer.remove_callback(PrinterCallback)
    resume_from = checkpoints.history.folder
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    finally:
        meter.stop_counting()
    return optimizer, trainer.count_tokens()


def settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The class of `optimizer` and its groups' values, as JSON has them."""
    kinds = str, bool, int, float, tuple
    values = {name: own for name, own in optimizer.defaults.items() if isinstance(own, kinds)}
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    return {"class": kind, **hashed_values(values)}


def arguments(setup: Setup) -> TrainingArguments:
    """The recipe in the Trainer's own words."""
    recipe = setup.recipe
    batch_size, accumulation = local_batch(recipe, setup.num_ranks)
    return TrainingArguments(
        output_dir=str(setup.checkpoints.folder),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_ratio,  # below 1 the Trainer takes it as a share of all steps
        max_grad_norm=recipe.max_grad_norm,
        seed=setup.seed,
        data_seed=setup.seed,
        remove_unused_columns=False,  # the collator knows which fields it takes
        use_cpu=setup.device == "cpu",
        ddp_find_unused_parameters=False if setup.num_ranks > 1 else None,
        include_num_input_tokens_seen="non_padding",
        # Every loss is logged as it is: a NaN that the Trainer averages away would go unseen.
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        save_strategy="no",  # Checkpoints says when
        report_to=[],
    )


def local_batch(recipe: Recipe, num_ranks: int) -> tuple[int, int]:
    """Batch size and accumulation steps of each of `num_ranks`."""
    return share(recipe.batch_size, recipe.gradient_accumulation_steps, num_ranks)
