"""The rows of a data set: a JSONL or parquet file, a local folder, or a hub repository."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suites import hub
from suites.sources import ALLOWED, LINES, TABLES

if TYPE_CHECKING:
    from suites.sources import DataSource


@dataclass(frozen=True)
class Rows:
    """Rows as mappings, and how a message names one of them."""

    name: str
    values: Sequence[Mapping[str, Any]]
    #: For each row the number of its line or row in the source, counted from 1.
    numbers: Sequence[int]
    unit: str = "row"

    def where(self, index: int) -> str:
        """`train.jsonl, line 7`"""
        return f"{self.name}, {self.unit} {self.numbers[index]}"


def read_rows(source: DataSource) -> Rows:
    """The rows of `source`, or the `num_examples` that its `choice_seed` chooses, in their order.

    Raises ValueError for a source that is missing, empty or broken, naming the line, and for a
    hub repository that cannot be had.
    """
    path = Path(source.path)
    if path.is_file() and path.suffix in LINES:
        return _read_lines(path, source)
    if path.is_file() and path.suffix in TABLES:
        table = _parquet(path)
    elif path.is_dir() or (not path.exists() and hub.is_id(source.path)):
        table = _data_set(source)
    else:
        what = "ends in no known way" if path.is_file() else "is not a file"
        raise ValueError(f"{source.path} {what}; needed: {ALLOWED}")
    indices = _chosen(len(table), source)
    return Rows(source.path, table.select(indices).to_list(), [index + 1 for index in indices])


def _read_lines(path: Path, source: DataSource) -> Rows:
    numbered = list(_lines(path))
    chosen = [numbered[index] for index in _chosen(len(numbered), source)]
    return Rows(str(path), [row for _, row in chosen], [number for number, _ in chosen], "line")


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and object of every line that is not empty."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:  # of JSON or of UTF-8
                why = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{path}, line {number}: broken JSON: {why}") from error
            if not isinstance(row, dict):
                kind = type(row).__name__
                raise ValueError(f"{path}, line {number}: a JSON object is needed, got {kind}")
            yield number, row


def _parquet(path: Path) -> Any:
    import pyarrow
    from datasets import Dataset
    from pyarrow import parquet

    try:
        return Dataset(parquet.read_table(path))
    except (pyarrow.ArrowException, OSError) as error:
        first = str(error).split("\n")[0]
        raise ValueError(f"{path} cannot be read as parquet: {first}") from error


def _data_set(source: DataSource) -> Any:
    """A folder or hub repository as `datasets` reads it: the two go the same way."""
    local = Path(source.path).is_dir()
    if not local:
        hub.stay_offline_if_unreachable()
    from datasets import load_dataset

    try:
        return load_dataset(
            source.path, name=source.subset, split=source.split, revision=source.revision
        )
    except Exception as error:  # of datasets, the hub, the network and every file format
        what = f"subset {source.subset}, split {source.split}"
        first = str(error).strip().split("\n")[0]
        advice = "" if local else "; --data takes the path of a local copy"
        raise ValueError(
            f"data {source.path} ({what}) cannot be loaded: {type(error).__name__}: {first}{advice}"
        ) from error


def _chosen(count: int, source: DataSource) -> Sequence[int]:
    """Indices of the rows that are used, in order."""
    if count == 0:
        raise ValueError(f"{source.path} has no rows, at least one is needed")
    if source.num_examples is None or source.num_examples >= count:
        return range(count)
    return sorted(random.Random(source.choice_seed).sample(range(count), source.num_examples))
