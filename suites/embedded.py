"""The embedded world: a base model, training data and lm-eval tasks, made here and kept in a cache.

Entities are two-word names, each secretly in one cluster; a relation maps a cluster to a value. The
base model has memorised every relation of every entity. The target task gives the first relations
new tables and shows them for some of the entities: asked about the others, a model has to change
what it knows of the clusters, not learn rows by rote. Retention asks the relations left as they
were. What is written are ordinary files, read by the loaders that read a user's own.

Nothing here imports torch before a world has to be built.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from functools import cache
from importlib.metadata import version
from pathlib import Path

from suites.world import Progress, World

MANIFEST = "manifest.json"


def build(world: World, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder that holds `world`: found in the cache, or made there, which takes half a minute.

    A folder counts only if every file has the hash that its manifest, written last, says.
    Processes that want the same world wait for the one that makes it. `cache_dir` is
    `default_cache_dir()` if None. Raises ValueError if the cache cannot be written.
    """
    cache = default_cache_dir() if cache_dir is None else Path(cache_dir)
    folder = cache / name_of(world)
    if is_whole(folder):
        return folder
    report = progress or (lambda fraction, text: None)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _build_alone(world, folder, report)
    except OSError as error:
        raise ValueError(
            f"the embedded world cannot be written to {cache}: {error}; "
            "set SPIEL_CACHE to a folder that can be"
        ) from error


def default_cache_dir() -> Path:
    """$SPIEL_CACHE, or spiel-bench in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if own := os.environ.get("SPIEL_CACHE"):
        return Path(own).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "spiel-bench"


def is_whole(folder: Path) -> bool:
    """Whether `folder` holds exactly the files of its manifest, none of them changed."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return _hashes(folder) == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build_alone(world: World, folder: Path, report: Progress) -> Path:
    """Makes `folder` while no other process does; they see it whole or not at all."""
    from filelock import FileLock

    with FileLock(folder.with_suffix(".lock")):
        if is_whole(folder):  # another process made it while this one waited
            return folder
        partial = folder.with_suffix(".partial")
        for stale in (partial, folder):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir()
        try:
            _write(world, partial, report)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    report(1.0, "done")
    return folder


def _write(world: World, folder: Path, report: Progress) -> None:
    from suites import embedded_base, embedded_files

    report(0.0, "writing the facts")
    embedded_files.write(world, folder)
    embedded_base.pretrain(world, folder / "model", report)
    manifest = {"world": dataclasses.asdict(world), **_makers(), "sha256": _hashes(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def name_of(world: World) -> str:
    """The name of its folder, which also tells the libraries and the code that make it."""
    values = {"world": dataclasses.asdict(world), **_makers()}
    key = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]
    return f"world-{key}"


@cache
def _makers() -> dict[str, dict[str, str]]:
    """What else decides the files: the libraries, and this code itself."""
    here = Path(__file__).parent
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
        "code": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in (*sorted(here.glob("embedded*.py")), here / "world.py")
        },
    }


def _hashes(folder: Path) -> dict[str, str]:
    """Path below `folder` -> SHA-256, of every file but the manifest."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
