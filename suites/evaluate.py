"""lm-eval on the model in memory: one TaskScore per task, with what every item got."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import math
import os
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from suites import hub, questions
from suites.record import TaskScore
from suites.sources import Task
from suites.values import short_hash

#: lm-eval's own hashes of an item: of its row, of the prompt, and of the right answer.
HASHES = ("doc_hash", "prompt_hash", "target_hash")


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[Task],
    task_folder: str | None,
    batch_size: int,
    limit: int | None = None,
    allow_code_execution: bool = False,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, TaskScore]:
    """Runs lm-eval's `tasks` on `model` (a transformers or peft model) as it stands.

    Tasks, groups and tags are found by `suites.questions`. `limit` asks only the first so many
    items of each subtask; `begin` hears of each task before it is asked. The model's training
    mode and the random generators are left as they were. Raises ValueError for a task or a metric
    that there is not, for data that cannot be had, and for a task that runs code unless that is
    allowed.
    """
    if not tasks:
        return {}
    if tokenizer is None:
        raise ValueError("a mere shape has no tokenizer, so it cannot be asked any task")
    with _quiet(), _same_random_state(), _same_mode(model):
        if any(questions.hub_data(task.name, task_folder) for task in tasks):
            hub.stay_offline_if_unreachable()
        from suites.harness import Harness

        harness = Harness(model, tokenizer, batch_size)
        scores = {}
        for task in tasks:
            begin(task.name)
            scores[task.name] = _ask(harness, task, task_folder, limit, allow_code_execution)
        return scores


def check(tasks: Sequence[Task], task_folder: str | None) -> None:
    """Raises ValueError for what `evaluate` would refuse only after training.

    That is a task that there is not, data that cannot be had, and a metric or filter that the task
    does not give: found by a question of each kind of subtask, put to a model that guesses. Not
    asked are tasks that run code, and those of the user's whose own functions fail on a guess.
    """
    with _quiet(), _same_random_state():
        if any(questions.hub_data(task.name, task_folder) for task in tasks):
            hub.stay_offline_if_unreachable()
        for task in tasks:
            if not task.runs_code:
                _check(task, task_folder)


def _check(task: Task, task_folder: str | None) -> None:
    from lm_eval import evaluate as run_tasks
    from lm_eval.models.dummy import DummyLM

    names = questions.one_of_each_kind(task.name, task_folder)
    for name, loaded in questions.load(task, task_folder, names).items():
        try:
            results = run_tasks(DummyLM(), {"tasks": {name: loaded}}, limit=1, bootstrap_iters=0)
        except Exception:  # of whatever the task's own functions do with a guess
            continue
        if task.metric not in _promised(loaded):
            _score(name, task, results)


def _promised(loaded: Any) -> set[str]:
    """What a task with a function for its results says these are: a guess may not get them all."""
    if getattr(loaded.config, "process_results", None) is None:
        return set()
    filters = [each.name for each in loaded._filters]
    return {f"{metric},{name}" for metric in loaded.aggregation() for name in filters}


def _ask(
    harness: Any, task: Task, task_folder: str | None, limit: int | None, allow_code: bool
) -> TaskScore:
    """One task by itself, so that what is set for it is set for no other."""
    from lm_eval import evaluate as run_tasks

    with _code_execution(task, allow_code), _seeded():
        num_cut = harness.num_cut
        loaded = questions.load(task, task_folder)
        results = run_tasks(
            harness,
            {"tasks": loaded},
            limit=limit,
            bootstrap_iters=0,  # intervals are ours to compute, from the items
            apply_chat_template=task.apply_chat_template,
            fewshot_as_multiturn=task.apply_chat_template,
            confirm_run_unsafe_code=allow_code,
        )
    parts = {name: _score(name, task, results) for name in loaded}
    if list(parts) == [task.name]:
        score = parts[task.name]
    else:
        score = _pooled(task, parts, questions.weighs_by_size(task, task_folder))
    return dataclasses.replace(score, num_cut=harness.num_cut - num_cut)


def _score(name: str, task: Task, results: Mapping[str, Any]) -> TaskScore:
    """What lm-eval's `results` say of the subtask `name` of `task`."""
    key, values = task.metric, results["results"][name]
    if key not in values:
        there = ", ".join(key for key in values if "," in key and "_stderr" not in key)
        raise ValueError(f"task {name} has no metric {key!r}; it has: {there}")
    metric, _, chosen = key.partition(",")
    samples = [sample for sample in results["samples"][name] if sample["filter"] == chosen]
    samples.sort(key=lambda sample: sample["doc_id"])
    if any(isinstance(sample[metric], list | tuple) for sample in samples):
        raise ValueError(f"metric {key!r} of task {name} is no mean over items, so none is kept")
    return TaskScore(
        value=float(values[key]),
        metric=key,
        role=task.role,
        split=task.split,
        num_items=len(samples),
        per_item=tuple(float(sample[metric]) for sample in samples),
        doc_ids=tuple(sample["doc_id"] for sample in samples),
        subtasks={name: len(samples)},
        items_hash=short_hash([[sample[name] for name in HASHES] for sample in samples]),
    )


def _pooled(task: Task, parts: Mapping[str, TaskScore], by_size: bool) -> TaskScore:
    weights = [part.num_items if by_size else 1 for part in parts.values()]
    values = [part.value for part in parts.values()]
    return TaskScore(
        value=statistics.fmean(values, weights),
        metric=task.metric,
        role=task.role,
        split=task.split,
        num_items=sum(part.num_items for part in parts.values()),
        per_item=tuple(item for part in parts.values() for item in part.per_item),
        doc_ids=tuple(number for part in parts.values() for number in part.doc_ids),
        subtasks={name: part.num_items for name, part in parts.items()},
        weighs_by_size=by_size,
        items_hash=short_hash([part.items_hash for part in parts.values()]),
    )


def flaw(score: TaskScore) -> str:
    """The first value that is no finite number, as `nan on item 0`; "" if there is none."""
    asked = [name for name, num in score.subtasks.items() for _ in range(num)]
    for index, value in enumerate(score.per_item):
        if not math.isfinite(value):
            subtask = f" of {asked[index]}" if len(score.subtasks) > 1 else ""
            return f"{value} on item {score.doc_ids[index]}{subtask}"
    return "" if math.isfinite(score.value) else str(score.value)


@contextlib.contextmanager
def _code_execution(task: Task, allowed: bool) -> Iterator[None]:
    """Lets `task` run code that the model wrote, if it does so and that is allowed."""
    if not task.runs_code:
        yield
        return
    if not allowed:
        raise ValueError(f"task {task.name} runs code that the model wrote, which is not allowed")
    before = os.environ.get("HF_ALLOW_CODE_EVAL")
    os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        del os.environ["HF_ALLOW_CODE_EVAL"]
        if before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without their chatter, and without their progress bars on stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as lm-eval's own command seeds them: some tasks shuffle their answers."""
    with _same_random_state():
        random.seed(0)
        np.random.seed(1234)
        torch.manual_seed(1234)
        yield


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextlib.contextmanager
def _same_mode(model: torch.nn.Module) -> Iterator[None]:
    """Puts every module back into training or evaluation mode, as each was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
