"""What the command line changes of a suite: another suite, under a name that says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from suites.budget import Budget
from suites.plan import safe_name
from suites.sources import ROLES, Task
from suites.suite import Suite
from suites.values import short_hash


def override(suite: Suite, **values: Any) -> Suite:
    """The suite with every value of `values` that is not None, in the order of OVERRIDES.

    The name says what was changed; it keeps the records and tables of the changed suite apart
    from those of the suite as it is defined. Raises ValueError for a value that cannot be.
    """
    unknown = set(values) - set(OVERRIDES)
    assert not unknown, f"no such override: {unknown}"
    for flag, (change, label) in OVERRIDES.items():
        value = values.get(flag)
        if value is not None and value is not False:
            name = f"{suite.name}-{label(value)}"
            suite = dataclasses.replace(change(suite, value), name=name)
    return suite


def parse_tasks(text: str, suite: Suite) -> tuple[Task, ...]:
    """`a,b:acc,c:exact_match/strict-match:retention` -> tasks, and those of the dev split.

    A bare name is a task of the suite. Any other of lm-eval's needs its metric, may name the
    metric's filter behind a slash (else `none`), and its role (else `target`).
    """
    chosen = tuple(_task(part.strip(), suite) for part in text.split(","))
    kept = tuple(task for task in suite.tasks_of("dev") if task not in chosen)
    return (*chosen, *kept)


def _task(text: str, suite: Suite) -> Task:
    name, _, rest = text.partition(":")
    if not rest:
        # Of two tasks of one name the one on the test split is meant; `dev` sorts before it.
        own = {task.name: task for task in sorted(suite.tasks, key=lambda task: task.split)}
        if name not in own:
            raise ValueError(
                f"--tasks: {name!r} is no task of {suite.name}, which has "
                f"{', '.join(own) or 'none'}; another of lm-eval's needs its metric, "
                "as in arc_easy:acc or gsm8k:exact_match/strict-match:retention"
            )
        return own[name]
    metric, _, role = rest.partition(":")
    metric, _, filtered = metric.partition("/")
    if (role or "target") not in ROLES:
        raise ValueError(f"--tasks: role {role!r} in {text!r} is not one of {', '.join(ROLES)}")
    return Task(name, f"{metric},{filtered or 'none'}", role or "target")  # type: ignore[arg-type]  # one of ROLES


def place(path: str) -> str:
    """A path that exists as an absolute one; anything else (a hub id) as it is."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path


def _place_label(kind: str) -> Callable[[str], str]:
    """`model-gpt2` for a hub id; `model-mine-3f2a` for a folder: others may be called `mine`."""

    def label(path: str) -> str:
        if not Path(path).exists():
            return f"{kind}-{safe_name(path)}"
        return f"{kind}-{safe_name(Path(path).stem)}-{short_hash(place(path))[:4]}"

    return label


def _part(part: str, name: str) -> Callable[[Suite, Any], Suite]:
    """Changes the field `name` of the suite's dataclass `part`."""

    def change(suite: Suite, value: Any) -> Suite:
        own = dataclasses.replace(getattr(suite, part), **{name: value})
        return dataclasses.replace(suite, **{part: own})

    return change


def _whole(name: str) -> Callable[[Suite, Any], Suite]:
    return lambda suite, value: dataclasses.replace(suite, **{name: value})


def _source(part: str) -> Callable[[Suite, str], Suite]:
    """Changes where the suite's `part` comes from: a local path, or `owner/name@revision`."""

    def change(suite: Suite, text: str) -> Suite:
        path, at, revision = (text, "", "") if Path(text).exists() else text.partition("@")
        if at and (not path or not revision or Path(path).exists()):
            raise ValueError(
                f"--{part}: {text!r} is neither a path nor a hub id, as owner/name@commit"
            )
        source = getattr(suite, part)
        found = dataclasses.replace(source, path=place(path), revision=revision or None)
        return dataclasses.replace(suite, **{part: found})

    return change


def _task_folder(suite: Suite, path: str) -> Suite:
    if not Path(path).is_dir():
        raise ValueError(f"--task-folder: {path} is no folder")
    return dataclasses.replace(suite, task_folder=place(path))


def _tasks(suite: Suite, text: str) -> Suite:
    return dataclasses.replace(suite, tasks=parse_tasks(text, suite))


def _budget(suite: Suite, text: str) -> Suite:
    return dataclasses.replace(suite, budget=Budget.parse(text, suite.budget.target_modules))


#: Flag -> (how it changes a suite, what it adds to the suite's name).
OVERRIDES: dict[str, tuple[Callable[[Suite, Any], Suite], Callable[[Any], str]]] = {
    "model": (_source("model"), _place_label("model")),
    "data": (_source("data"), _place_label("data")),
    "task_folder": (_task_folder, _place_label("asked")),
    "tasks": (_tasks, lambda text: f"tasks-{safe_name(text)}"),
    "steps": (_part("recipe", "num_steps"), lambda steps: f"steps{steps}"),
    "limit": (_whole("limit"), lambda limit: f"limit{limit}"),
    "batch_size": (_part("recipe", "batch_size"), lambda size: f"batch{size}"),
    "eval_batch_size": (_whole("eval_batch_size"), lambda size: f"evalbatch{size}"),
    "seq_len": (_part("data", "max_length"), lambda length: f"seq{length}"),
    "dtype": (_part("model", "dtype"), safe_name),
    "quantize": (_part("model", "quantize"), safe_name),
    "budget": (_budget, lambda text: f"budget-{safe_name(text)}"),
    "gradient_checkpointing": (_part("recipe", "gradient_checkpointing"), lambda _: "checkpointed"),
    "allow_code_execution": (_whole("allow_code_execution"), lambda _: "code"),
    "trust_remote_code": (_part("model", "trust_remote_code"), lambda _: "remote-code"),
    "device": (_whole("device"), safe_name),
}
