"""lm-eval's tasks by name: found among a suite's own, ours and lm-eval's, and loaded.

A folder of tasks holds YAML files in lm-eval's format, and may hold local copies of hub data sets:
DIR/owner/name stands for owner/name in every task that asks for it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from suites.sources import Task

#: Tasks that this repository defines.
OWN_TASKS = Path(__file__).parent / "tasks"

#: Decides which examples are shown before the question where a task shows any; lm-eval's default.
FEWSHOT_SEED = 1234

#: lm-eval's names for the loaders of `datasets` that read files, of which ours may be relative.
FILE_LOADERS = ("json", "csv", "parquet", "text")

#: What a group says of itself; all else it says is said of its tasks.
GROUP_FIELDS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")


@dataclass(frozen=True)
class Subtask:
    """A task that has questions, not a group of such."""

    name: str
    #: lm-eval's YAML, its includes merged and its functions unresolved.
    config: Mapping[str, Any]
    folder: Path
    #: What the groups above it say differently.
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def said(self) -> Mapping[str, Any]:
        """What it and the groups above it say."""
        return {**self.config, **self.overrides}

    @property
    def path(self) -> str:
        """Of its data: a hub id, a folder, or one of FILE_LOADERS."""
        return str(self.said.get("dataset_path"))


def subtasks(name: str, task_folder: str | None) -> list[Subtask]:
    """The tasks behind the task, group or tag `name`, in lm-eval's order.

    Looked for in `task_folder` if there is one, then among OWN_TASKS and lm-eval's. Raises
    ValueError, naming the nearest there are, if it is nowhere.
    """
    return list(_leaves(name, _manager(name, task_folder), {}))


def hub_data(name: str, task_folder: str | None) -> list[str]:
    """The hub ids of the data sets that the task `name` asks for, each once."""
    paths = dict.fromkeys(leaf.path for leaf in subtasks(name, task_folder))
    return [
        path
        for path in paths
        if path not in (*FILE_LOADERS, "None")
        and not Path(path).is_dir()
        and _local_copy(path, task_folder) is None
    ]


def one_of_each_kind(name: str, task_folder: str | None) -> list[str]:
    """Of the subtasks of `name`, one of each way to score."""
    chosen: dict[str, str] = {}
    for leaf in subtasks(name, task_folder):
        way = [leaf.said.get(key) for key in ("output_type", "metric_list", "filter_list")]
        chosen.setdefault(repr(way), leaf.name)
    return list(chosen.values())


def load(task: Task, task_folder: str | None, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Name -> lm-eval's task, its data loaded, for each of the subtasks of `task`.

    `names` are those that are wanted, if not all. Raises ValueError, naming the data set, where its
    data cannot be had.
    """
    manager = _manager(task.name, task_folder)
    loaded = {}
    for leaf in _leaves(task.name, manager, {}):
        if names is not None and leaf.name not in names:
            continue
        changed = {**leaf.overrides, **_data(leaf, task_folder)}
        if task.data_split is not None:
            changed["test_split"] = task.data_split
        # In a group, a task may be named together with what is different about it.
        spec = {"group": f"only {leaf.name}", "task": [{"task": leaf.name, **changed}]}
        try:
            found = manager.load(spec)["tasks"][leaf.name]
        except Exception as error:  # of datasets, the hub, the network and every file format
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"task {leaf.name}: its data {leaf.path} cannot be loaded: "
                f"{type(error).__name__}: {first}"
            ) from error
        if task.num_fewshot is not None:
            found.set_config("num_fewshot", task.num_fewshot)
        found.set_fewshot_seed(FEWSHOT_SEED)
        loaded[leaf.name] = found
    return loaded


def weighs_by_size(task: Task, task_folder: str | None) -> bool:
    """Whether every item counts alike in `task`, as its group says; else every subtask does."""
    manager = _manager(task.name, task_folder)
    config = manager.task_index[task.name].cfg or {}
    aggregates = config.get("aggregate_metric_list") or []
    if isinstance(aggregates, Mapping):
        aggregates = [aggregates]
    metric = task.metric.partition(",")[0]
    return any(item["metric"] == metric and item.get("weight_by_size", True) for item in aggregates)


def _manager(name: str, task_folder: str | None) -> TaskManager:
    """Knows the tasks that may have to do with `name`: reading all of lm-eval's takes seconds."""
    from lm_eval.tasks import TaskManager

    if task_folder is not None and not Path(task_folder).is_dir():
        raise ValueError(f"task folder {task_folder} is no folder of lm-eval YAML files")
    own: list[str | Path] = [OWN_TASKS, *([] if task_folder is None else [task_folder])]
    built_in = [folder for folder in _built_in_folders() if name.startswith(folder.name)]
    # A later folder overrides an earlier one.
    manager = TaskManager(include_path=[*built_in, *own], include_defaults=False)
    if name not in manager.all_tasks and task_folder is None:
        manager = TaskManager(include_path=own, include_defaults=True)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.0)
        where = task_folder or "lm-eval"
        raise ValueError(f"{where} has no task {name!r}; nearest: {', '.join(near)}")
    return manager


def _built_in_folders() -> list[Path]:
    package = find_spec("lm_eval")
    assert package is not None and package.submodule_search_locations is not None
    root = Path(package.submodule_search_locations[0]) / "tasks"
    return sorted(path for path in root.iterdir() if path.is_dir())


def _leaves(name: str, manager: TaskManager, overrides: Mapping[str, Any]) -> Iterator[Subtask]:
    entry = manager.task_index[name]
    if name in manager.all_tags:
        for member in sorted(entry.tags):
            yield from _leaves(member, manager, overrides)
    elif name in manager.all_groups:
        config = entry.cfg or {}
        said = {key: value for key, value in config.items() if key not in GROUP_FIELDS}
        for member in config.get("task") or []:
            own = {} if isinstance(member, str) else dict(member)
            inner = member if isinstance(member, str) else own.pop("group", own.pop("task", None))
            if not isinstance(inner, str) or inner not in manager.all_tasks:
                raise ValueError(f"group {name} names {inner!r}, which is no task on its own")
            yield from _leaves(inner, manager, {**said, **overrides, **own})
    else:
        yield Subtask(name, entry.cfg or {}, entry.yaml_path.parent, overrides)


def _data(leaf: Subtask, task_folder: str | None) -> dict[str, Any]:
    """What has to be overridden for the task's data to be found where they are."""
    if leaf.path in FILE_LOADERS:
        return _data_files(leaf)
    copy = _local_copy(leaf.path, task_folder)
    return {} if copy is None else {"dataset_path": str(copy)}


def _local_copy(path: str, task_folder: str | None) -> Path | None:
    """The folder below `task_folder` that stands for the hub data set `path`."""
    if task_folder is None or "/" not in path:
        return None
    copy = Path(task_folder) / path
    return copy.resolve() if copy.is_dir() else None


def _data_files(leaf: Subtask) -> dict[str, Any]:
    """The task's `dataset_kwargs` with data files found from its YAML file, if it names any.

    `datasets` would look for them from the working directory. A path that is not there from the
    YAML file is left for it to look for.
    """
    options = leaf.said.get("dataset_kwargs") or {}
    if "data_files" not in options:
        return {}

    def found(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: found(names) for split, names in files.items()}
        if isinstance(files, Sequence) and not isinstance(files, str):
            return [found(name) for name in files]
        path = leaf.folder / files
        return str(path.resolve()) if path.exists() else files

    return {"dataset_kwargs": {**options, "data_files": found(options["data_files"])}}
