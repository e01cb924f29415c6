"""What of a suite lies on the hub, and whether it can be had: asked before anything starts.

A folder that exists is always meant before a hub repository of the same name.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from suites.shapes import SHAPES
from suites.sources import ALLOWED, LINES, RANDOM_TOKENS, TABLES
from suites.suite import WORLD, Suite

#: The hub's rule for repository ids: "name" or "owner/name".
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

TIMEOUT_SECONDS = 2.0

#: Endings of files with weights: a cached model without any was never loaded whole.
WEIGHTS = (".safetensors", ".bin")

#: What stands above the lines of `missing_from_hub`.
MISSING = "cannot be had from the hub:"

#: How a message names the flag that takes a local path instead.
MODEL_INSTEAD = "--model takes a local model folder"
DATA_INSTEAD = "--data takes a local file or folder"
TASK_INSTEAD = "--task-folder DIR takes a copy of it in DIR/{id}"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """A hub repository that a suite needs: a "model" or a "dataset"."""

    kind: str
    id: str
    #: What needs it, and what would do instead.
    use: str
    instead: str

    def line(self, problem: str) -> str:
        return f"{self.use} {self.id}: {problem}; {self.instead.format(id=self.id)}"


def is_id(path: str) -> bool:
    return HUB_ID.fullmatch(path) is not None


def missing_from_hub(suite: Suite) -> list[str]:
    """One line for each thing that `suite` needs from the hub and cannot have, local paths named.

    Empty if nothing is missing. The hub is asked for all of them at once, for at most
    `TIMEOUT_SECONDS`; with HF_HUB_OFFLINE set, or the hub out of reach, only what the hub's cache
    holds counts. Raises ValueError for a task that there is not, and for a model or data that are
    neither local nor of the hub.
    """
    wanted = [*_model(suite), *_data(suite), *_tasks(suite)]
    problems: dict[Wanted, str | None] = {}

    def ask(item: Wanted) -> None:
        problems[item] = problem(item.kind, item.id)

    # Daemons, because a name server that keeps silent holds a thread beyond any timeout.
    threads = [threading.Thread(target=ask, args=(item,), daemon=True) for item in wanted]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    lines = []
    for item in wanted:
        silence = None if is_cached(item.kind, item.id) else "the hub does not answer"
        reason = problems.get(item, silence)
        if reason is not None:
            lines.append(item.line(reason))
    return lines


def _model(suite: Suite) -> list[Wanted]:
    source = suite.model
    if suite.world is not None and source.path.startswith(WORLD):
        return []
    if (source.shape_only and source.path in SHAPES) or is_model_folder(source.path):
        return []
    return [Wanted("model", source.path, "model", MODEL_INSTEAD)]


def _data(suite: Suite) -> list[Wanted]:
    path = suite.data.path
    if path == RANDOM_TOKENS or path.startswith(WORLD) or Path(path).exists():
        return []
    if not is_id(path) or path.endswith((*LINES, *TABLES)):
        raise ValueError(f"data {path} is not there, seen from {Path.cwd()}; needed: {ALLOWED}")
    return [Wanted("dataset", path, "data", DATA_INSTEAD)]


def _tasks(suite: Suite) -> list[Wanted]:
    folder = suite.task_folder
    if not suite.tasks or (folder is not None and folder.startswith(WORLD)):
        return []
    from suites.questions import hub_data

    names = [task.name for split in ("test", "dev") for task in suite.tasks_of(split)]
    wanted: dict[str, Wanted] = {}
    for name in dict.fromkeys(names):
        for path in hub_data(name, folder):
            wanted.setdefault(path, Wanted("dataset", path, f"data of task {name}", TASK_INSTEAD))
    return list(wanted.values())


def problem(kind: str, path: str) -> str | None:
    """Why the repository cannot be had, in a few words; None if it can, or is in the cache."""
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _refusal(kind, path)
    return None if reason is None or is_cached(kind, path) else reason


def _refusal(kind: str, path: str) -> str | None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi()
    try:
        info = getattr(api, f"{kind}_info")(path, timeout=TIMEOUT_SECONDS)
        if getattr(info, "gated", False):  # its description is public, its files are not
            api.auth_check(path, repo_type=kind)
    except GatedRepoError:
        return "its owner has to grant access (ask on its page, then set HF_TOKEN)"
    except RepositoryNotFoundError:
        return "the hub has no such repository, or it is private and HF_TOKEN is not set"
    except Exception as error:  # offline errors have no class in common, not even OSError
        return f"the hub cannot be reached ({type(error).__name__})"
    return None


def is_cached(kind: str, path: str) -> bool:
    """Whether the hub's cache, or that of `datasets`, holds files of the repository."""
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"{kind}s--{path.replace('/', '--')}" / "snapshots"
    files = [file for file in snapshots.rglob("*") if file.is_file()]
    if kind == "model":
        return any(file.suffix in WEIGHTS for file in files)
    prepared = Path(os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME) / "datasets")
    from datasets.naming import camelcase_to_snakecase

    owner, _, name = path.rpartition("/")
    folder = f"{owner}___{camelcase_to_snakecase(name)}" if owner else camelcase_to_snakecase(name)
    return bool(files) or any((prepared / folder).glob("*/*"))


def cached_commit(model: str, revision: str | None = None) -> str | None:
    """The commit of the repository `model` that the hub's cache has as `revision`; None of a
    folder.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(model).exists() or not is_id(model):
        return None
    found = try_to_load_from_cache(model, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def whereabouts(path: str) -> dict[str, bool]:
    """What from_pretrained has to be told to find the model `path`, checked before it tries long.

    The answer for a local folder, or for a hub repository that is in the hub's cache while the
    hub is out of reach, is {"local_files_only": True}. Raises ValueError if `path` is neither a
    folder, nor cached, nor a repository that the hub lets us read.
    """
    if is_model_folder(path):
        return {"local_files_only": True}
    reason = _refusal("model", path)
    if reason is None:
        return {}
    if is_cached("model", path):
        log.warning("model %s: %s; its cached copy is used", path, reason)
        return {"local_files_only": True}
    raise ValueError(
        f"model {path} is not in the hub's cache, and {reason}; "
        "the path of a local model folder would do instead"
    )


def is_model_folder(path: str) -> bool:
    """Whether `path` is a local folder; ValueError if it holds no model, or is no hub id either."""
    if path and Path(path).is_dir():  # Path("") is the working directory
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} is a folder without config.json, so it holds no model")
        return True
    if not is_id(path):
        raise ValueError(f"model path {path!r} is neither a folder nor a hub id, as owner/name")
    return False


def stay_offline_if_unreachable() -> None:
    """Switches the hub off in this process if it does not answer, so that caches answer at once.

    Otherwise every file that is wanted costs some twenty seconds of attempts.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _answers(constants.ENDPOINT):
        return
    import datasets

    log.warning("%s does not answer; only what is in its cache is used", constants.ENDPOINT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _answers(url: str) -> bool:
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=TIMEOUT_SECONDS)
    except Exception:  # of no class in common, as in _refusal
        return False
    return True
