"""One cell, top to bottom: suite -> model and data -> prepare -> fit -> evaluate -> record."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from suites import measure, train
from suites.data import Collator, Examples, load_examples
from suites.evaluate import Score, evaluate
from suites.methods import Contestant
from suites.models import load_model, load_tokenizer
from suites.plan import Cell
from suites.progress import Report
from suites.provenance import environment
from suites.record import Record, Size, TaskScore, Training, now
from suites.suite import Task, placed


def run(cell: Cell, world: Path | None, report: Callable[[Report], None]) -> Record:
    """Does the cell's work in this process; what goes wrong is in the record, with what was done.

    `world` is the folder of the suite's embedded world, where it has one. `report` hears of every
    phase and step.
    """
    started_at = now()
    parts: dict[str, Any] = {"world": world.name if world else None}
    status, reason = "ok", ""
    try:
        _work(cell, world, report, parts)
    except Exception as error:
        traceback.print_exc()
        status, reason = diagnose(error)
    return Record.of(cell, status, reason, started_at, **parts)


def _work(
    cell: Cell, world: Path | None, report: Callable[[Report], None], parts: dict[str, Any]
) -> None:
    """Fills `parts`, the fields of the record, as they become known."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    suite = placed(cell.suite, world)
    meter = measure.Meter(device, lambda phase: report(Report(phase)))
    parts["environment"] = environment(device)
    parts["phases"] = meter.phases

    with meter.phase("load"):
        set_seed(cell.seed)
        tokenizer = load_tokenizer(suite.model)
        model = load_model(suite.model, device)
        vocab_size = model.get_input_embeddings().num_embeddings
        examples = load_examples(suite.data, tokenizer, vocab_size)
        collate = Collator.of(tokenizer)

    num_weights, asked = model.num_parameters(), suite.budget.num_weights(model)
    with meter.phase("prepare"):
        contestant = cell.entry.load().prepare(model, suite.budget, suite.recipe.num_steps)
    parts["size"] = size(contestant, num_weights, asked if cell.entry.matched else None)

    if cell.entry.trains:
        _train(cell, contestant, examples, collate, meter, report, parts)
    parts["backend"] = getattr(contestant, "backend", None)

    tasks = suite.tasks_of(cell.split)
    with meter.phase("evaluate"):
        scores = evaluate(
            contestant.model,
            tokenizer,
            tasks,
            suite.task_folder,
            suite.eval_batch_size,
            suite.limit,
            allow_code_execution=suite.allow_code_execution,
        )
    parts["scores"] = {task.name: task_score(task, scores[task.name]) for task in tasks}


def _train(
    cell: Cell,
    contestant: Contestant,
    examples: Examples,
    collate: Collator,
    meter: measure.Meter,
    report: Callable[[Report], None],
    parts: dict[str, Any],
) -> None:
    """Weighs one forward pass, trains, weighs what came of it; a failure keeps the steps done."""
    recipe = cell.suite.recipe
    steps = measure.StepMeter(meter.device)
    watch = train.LossWatch(
        lambda step, loss: report(Report("train", step, recipe.num_steps, loss))
    )
    batch = collate(examples[: recipe.batch_size])
    batch = {name: tensor.to(meter.device) for name, tensor in batch.items()}
    saved_bytes = measure.saved_for_backward_bytes(contestant.model, batch)
    try:
        with meter.phase("train"):
            optimizer, num_tokens = train.fit(
                contestant,
                examples,
                collate,
                recipe,
                cell.tuning,
                cell.seed,
                meter.device,
                steps,
                watch,
            )
    finally:
        training = Training(
            tuple(watch.losses),
            tuple(steps.step_seconds),
            tuple(steps.callback_seconds),
            num_examples=len(examples),
            num_dropped=examples.num_dropped,
        )
        parts["training"] = training
    parts["training"] = dataclasses.replace(training, num_tokens=num_tokens)
    parts["size"] = dataclasses.replace(
        parts["size"],
        saved_for_backward_bytes=saved_bytes,
        optimizer_state_bytes=measure.optimizer_state_bytes(optimizer),
        artifact_bytes=measure.artifact_bytes(contestant.artifact),
    )


def diagnose(error: Exception) -> tuple[str, str]:
    """Status and reason of a cell that ended in `error`."""
    if isinstance(error, train.DivergedError):
        return "diverged", str(error)
    reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "oom", reason
    # torch's CPU allocator has no exception of its own.
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return "oom", reason
    return "failed", reason


def size(contestant: Contestant, num_weights: int, num_asked: int | None) -> Size:
    """What was asked and what the method made of it; within 1 % is matched."""
    met = contestant.num_trainable
    matched = num_asked is not None and abs(met - num_asked) <= 0.01 * num_asked
    return Size(num_weights, met, num_asked, matched)


def task_score(task: Task, score: Score) -> TaskScore:
    return TaskScore(
        value=score.value,
        metric=score.metric,
        role=task.role,
        split=task.split,
        num_items=score.num_items,
        per_item=tuple(score.per_item),
        doc_ids=tuple(score.doc_ids),
    )
