"""What the processes of a cell tell their runner, besides progress Reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Ended:
    """A cell's last word: its record is written."""

    status: str
    reason: str


@dataclass(frozen=True)
class Skipped:
    """There was nothing to do, because of another runner."""

    reason: str


@dataclass(frozen=True)
class Lost:
    """A rank that is not the main one failed."""

    status: str
    reason: str


@dataclass(frozen=True)
class Built:
    """The embedded world lies in `folder`, or could not be made, for `problem`."""

    folder: Path | None
    problem: str = ""


@dataclass(frozen=True)
class Checked:
    """No cell can succeed, for `problem`, or those of some methods cannot: method -> why."""

    problem: str = ""
    refusals: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Unwritten:
    """The record could not be written."""

    problem: str
