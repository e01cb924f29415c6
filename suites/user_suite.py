"""A user's own suite: a Python file whose SUITE is one."""

from __future__ import annotations

import runpy
from pathlib import Path

from suites.suite import Suite


def is_file(name: str) -> bool:
    """Whether `name`, given where a suite's name is expected, means a file."""
    return name.endswith(".py")


def load_suite(path: str | Path) -> Suite:
    """The value SUITE of the Python file `path`, which is executed.

    Raises ValueError that names the file for one that is missing, fails, or has no such value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"suite file {path} is not there")
    try:
        suite = runpy.run_path(str(path)).get("SUITE")
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"suite file {path} fails: {type(error).__name__}: {error}") from error
    if not isinstance(suite, Suite):
        kind = "not there" if suite is None else f"a {type(suite).__name__}"
        raise ValueError(f"suite file {path}: SUITE must be a suites.suite.Suite, it is {kind}")
    return suite
