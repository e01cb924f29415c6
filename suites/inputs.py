"""What lies in local files that a cell reads: another content is another cell."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from suites.sources import DataSource, ModelSource


def fingerprint(model: ModelSource, data: DataSource) -> list[str]:
    """What tells the local model folder and data file from others; empty where neither is local.

    Data by its content. A model's weights are too large to be read each time, so they count by
    the names, sizes and times of change of the folder's files.
    """
    paths = [Path(source.path) for source in (model, data) if source.path]
    return [_content(path, _listed(path)) for path in paths if path.exists()]


@cache
def _content(path: Path, listed: tuple[tuple[str, int, int], ...]) -> str:
    if path.is_dir():
        return hashlib.sha256(repr(listed).encode()).hexdigest()[:16]
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _listed(path: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, bytes and time of change of `path`, or of the files right inside it."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
