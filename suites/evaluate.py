"""lm-eval on the model in memory: one Score per task, with what every item got."""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from suites.suite import Task

#: Decides which examples are shown before the question where a task shows any; lm-eval's default.
FEWSHOT_SEED = 1234

#: lm-eval's names for the loaders of `datasets` that read files, of which ours may be relative.
FILE_LOADERS = ("json", "csv", "parquet", "text")


@dataclass(frozen=True)
class Score:
    """What one task gave by one metric."""

    value: float
    metric: str
    #: The metric of each item (1.0 or 0.0 for accuracy), in the order of the task's items.
    per_item: tuple[float, ...]
    #: lm-eval's number of each of those items.
    doc_ids: tuple[int, ...]

    @property
    def num_items(self) -> int:
        return len(self.per_item)


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    task_folder: str | None,
    batch_size: int,
    limit: int | None = None,
    show_progress: bool = False,
) -> dict[str, Score]:
    """Runs lm-eval's `tasks` on `model` (a transformers or peft model) as it stands.

    Tasks are those of the YAML files below `task_folder`, or lm-eval's own if it is None. `limit`
    asks only the first so many items of each. The model's training mode and the random
    generators are left as they were. Raises ValueError for a task or a metric that there is not.
    """
    with _quiet(show_progress), _same_random_state(), _same_mode(model):
        from lm_eval import evaluate as run_tasks
        from lm_eval.models.huggingface import HFLM

        loaded = _load_tasks(tasks, task_folder)
        harness = HFLM(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        # bootstrap_iters=0: intervals are ours to compute, from the items.
        results = run_tasks(harness, {"tasks": loaded}, limit=limit, bootstrap_iters=0)
    return {task.name: _score(task, results) for task in tasks}


def _load_tasks(tasks: Sequence[Task], task_folder: str | None) -> dict[str, Any]:
    """Task name -> lm-eval's task, its data loaded."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"task folder {task_folder} is no folder of lm-eval YAML files")
    # Reading all of lm-eval's own tasks takes seconds, so they are read only if asked for.
    manager = TaskManager(include_path=task_folder, include_defaults=task_folder is None)
    loaded = {}
    for task in tasks:
        if task.name not in manager.all_subtasks:
            near = difflib.get_close_matches(task.name, manager.all_subtasks, n=5, cutoff=0.0)
            where = task_folder or "lm-eval"
            raise ValueError(f"{where} has no task {task.name!r}; nearest: {', '.join(near)}")
        # In a group, a task may be named together with what is different about it.
        changed = {"task": task.name, **_data_files(manager.task_index[task.name])}
        group = manager.load({"group": f"only {task.name}", "task": [changed]})
        loaded[task.name] = group["tasks"][task.name]
        if task.num_fewshot is not None:
            loaded[task.name].set_config("num_fewshot", task.num_fewshot)
        loaded[task.name].set_fewshot_seed(FEWSHOT_SEED)
    return loaded


def _data_files(entry: Any) -> dict[str, Any]:
    """The task's `dataset_kwargs` with data files found from its YAML file, if it names any.

    `datasets` would look for them from the working directory. A path that is not there from the
    YAML file is left for it to look for.
    """
    options = entry.cfg.get("dataset_kwargs") or {}
    if entry.cfg.get("dataset_path") not in FILE_LOADERS or "data_files" not in options:
        return {}

    def found(files: Any) -> Any:
        if isinstance(files, dict):
            return {split: found(names) for split, names in files.items()}
        if isinstance(files, list):
            return [found(name) for name in files]
        path = entry.yaml_path.parent / files
        return str(path.resolve()) if path.exists() else files

    return {"dataset_kwargs": {**options, "data_files": found(options["data_files"])}}


def _score(task: Task, results: dict[str, Any]) -> Score:
    """The task's Score; `task.metric` is "metric,filter", as in lm-eval's results."""
    values = results["results"][task.name]
    if task.metric not in values:
        there = ", ".join(key for key in values if "," in key and "_stderr" not in key)
        raise ValueError(f"task {task.name} has no metric {task.metric!r}; it has: {there}")
    metric, _, name = task.metric.partition(",")
    samples = [sample for sample in results["samples"][task.name] if sample["filter"] == name]
    samples.sort(key=lambda sample: sample["doc_id"])
    return Score(
        value=float(values[task.metric]),
        metric=task.metric,
        per_item=tuple(float(sample[metric]) for sample in samples),
        doc_ids=tuple(sample["doc_id"] for sample in samples),
    )


@contextlib.contextmanager
def _quiet(show_progress: bool) -> Iterator[None]:
    """lm-eval and datasets without their chatter, and without their progress bars on stderr."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    bars = contextlib.nullcontext() if show_progress else contextlib.redirect_stderr(io.StringIO())
    logger.setLevel(logging.ERROR)
    try:
        with bars:
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    import numpy as np
    import torch

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
