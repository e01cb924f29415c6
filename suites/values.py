"""Frozen values: what is allowed, what fields came later, and the hash that tells them apart."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def require(condition: bool, message: str) -> None:
    """Raises ValueError with `message` unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def require_finite(name: str, value: float) -> None:
    """Raises ValueError for a value that no record can hold."""
    require(math.isfinite(value), f"{name} must be finite, got {value}")


def given(value: T | None) -> T:
    """`value`, where it cannot be None: an ok record has its environment and size."""
    assert value is not None
    return value


def choose(kind: str, name: str, table: Mapping[str, Any]) -> Any:
    """`table[name]`; ValueError names the bad value and the allowed ones, nearest first."""
    if name in table:
        return table[name]
    raise ValueError(f"unknown {kind} {name!r}; choose from {', '.join(nearest(name, table))}")


def nearest(name: str, allowed: Iterable[str]) -> list[str]:
    """`allowed`, those most like `name` first."""

    def likeness(other: str) -> float:
        return difflib.SequenceMatcher(None, name.lower(), other.lower()).ratio()

    return sorted(allowed, key=likeness, reverse=True)


def added(default: Any) -> Any:
    """A dataclass field that came after records existed, with the `default` that they all had.

    It is hashed only where it differs from that, so that what was measured before still compares.
    """
    return dataclasses.field(default=default, metadata={"added": True})


def hashed_values(value: Any) -> Any:
    """`value` as plain JSON values, dataclasses as mappings, without `added` fields at default."""
    if dataclasses.is_dataclass(value):
        own = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        idle = [
            field.name
            for field in dataclasses.fields(value)
            if field.metadata.get("added") and own[field.name] == field.default
        ]
        return {name: hashed_values(own[name]) for name in own if name not in idle}
    if isinstance(value, Mapping):
        return {name: hashed_values(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [hashed_values(item) for item in value]
    return value


def short_hash(values: Any) -> str:
    """Twelve hexadecimal digits of the SHA-256 of `values` as sorted JSON."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
