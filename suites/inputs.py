"""What lies in local files that a cell reads: another content is another cell."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suites.suite import Suite

#: How the names of folders begin that do not count: Python writes the first when it calls a task's
#: functions, and the second are hidden.
IGNORED = ("__pycache__", ".")


#: What is known of suites' files within `unchanged`.
_known: dict[tuple[str | None, ...], list[str]] | None = None


@contextmanager
def unchanged() -> Iterator[None]:
    """Within the context local files do not change, and are looked at once."""
    global _known
    before, _known = _known, {} if _known is None else _known
    try:
        yield
    finally:
        _known = before


def fingerprint(suite: Suite) -> list[str]:
    """What tells the suite's local model, data and questions from others; empty if none is local.

    A data file and the questions count by their content. A model's weights are too large to be
    read each time, so folders of models and of data count by the names, sizes and times of change
    of their files. An embedded world is none of these: it has a key of its own.
    """
    if _known is None:
        return _look(suite)
    names = suite.model.path, suite.data.path, suite.task_folder
    if names not in _known:
        _known[names] = _look(suite)
    return _known[names]


def _look(suite: Suite) -> list[str]:
    paths = [Path(source.path) for source in (suite.model, suite.data) if source.path]
    found = [_content(path) if path.is_file() else _state(path) for path in paths if path.exists()]
    if suite.task_folder is not None and Path(suite.task_folder).is_dir():
        found.append(_questions(Path(suite.task_folder)))
    return found


def folders(suite: Suite) -> list[Path]:
    """The local folders that count in `fingerprint`."""
    paths = (suite.model.path, suite.data.path, suite.task_folder)
    return [Path(path) for path in paths if path and Path(path).is_dir()]


def _content(file: Path) -> str:
    state = file.stat()
    return _sha256(file, state.st_size, state.st_mtime_ns)


@cache
def _sha256(file: Path, num_bytes: int, changed_ns: int) -> str:
    """Of `file` as it is; it is read again when its size or time of change is another."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()[:16]


def _state(folder: Path) -> str:
    """Of names, bytes and times of change."""
    states = [(name, file.stat()) for name, file in _files(folder).items()]
    return _digest(tuple((name, state.st_size, state.st_mtime_ns) for name, state in states))


def _questions(folder: Path) -> str:
    """Of all in `folder`, and of what its YAML files name elsewhere, as data files often are."""
    files = _files(folder)
    yaml_files = [file for name, file in files.items() if name.endswith("yaml")]
    # Most names stand in many of the files, and each costs two looks at the disk.
    for near, text, may_be_folder in dict.fromkeys(
        place for f in yaml_files for place in _named(f)
    ):
        path = _found(near, text, may_be_folder)
        if path is not None:
            inside = _files(path) if path.is_dir() else {"": path}
            files |= {f"{text}/{name}": each for name, each in inside.items()}
    return _digest(tuple((name, _content(file)) for name, file in sorted(files.items())))


def _digest(values: tuple[object, ...]) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()[:16]


def _files(folder: Path) -> dict[str, Path]:
    """Name below `folder` -> file, at any depth and behind links, but not in hidden folders."""
    found, seen = [], set()
    for place, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link led back
            inside.clear()
        inside[:] = sorted(name for name in inside if not name.startswith(IGNORED))
        seen.add(real)
        found += [Path(place, name) for name in names]
    return {file.relative_to(folder).as_posix(): file for file in sorted(found) if file.is_file()}


def _named(file: Path) -> Iterator[tuple[Path, str, bool]]:
    """What in the YAML `file` may name a file: where to look first, the text, and whether it may be
    a folder of data.
    """
    for key, text in pairwise(("", *_scalars(file, _content(file)))):
        yield file.parent, text, key == "dataset_path"


def _found(near: Path, text: str, may_be_folder: bool) -> Path | None:
    """The file, or the folder of data, that `text` names, found as `datasets` would; else None."""
    for path in (near / text, Path(text)):
        with suppress(OSError):  # most are no path, and some too long for one
            if path.is_file() or (may_be_folder and path.is_dir()):
                return path
    return None


@cache
def _scalars(file: Path, content: str) -> tuple[str, ...]:
    """Keys and values of the YAML `file` of that content, its tags left alone; none if broken."""
    import yaml

    with suppress(yaml.YAMLError):
        tokens = yaml.scan(file.read_bytes())
        return tuple(token.value for token in tokens if isinstance(token, yaml.ScalarToken))
    return ()
