"""What is printed, on standard output or error: lines and tables."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


class Lasting:
    """A text stream that goes on when nobody reads it any more: that a terminal or a pipe was
    closed is no reason to lose a run.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._lose()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._lose()

    def _lose(self) -> None:
        """What is still to be written goes nowhere, at the end of the process too."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


def make_console(stderr: bool = False) -> Console:
    """Takes brackets in names for no markup, and has 100 columns where it is a file or a pipe,
    which has no width.
    """
    stream: Any = sys.stderr if stderr else sys.stdout  # None where it was closed at the start
    stream = stream and Lasting(stream)
    console = Console(file=stream, markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 100
    return console


def say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True)


def drawn(title: str, table: pd.DataFrame) -> Table:
    drawn = Table(title=title, title_justify="left")
    for index, name in enumerate(table.columns):
        # Where there is no room it goes on in the next line: a number that is cut is a wrong one.
        drawn.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
    for row in table.itertuples(index=False):
        drawn.add_row(*row)
    return drawn
