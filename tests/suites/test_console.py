"""Printing goes on whatever becomes of who reads it."""

import os
import subprocess
import sys

from suites.console import Lasting

PRINT = """
import sys
from suites.console import make_console, say

console = make_console()
for number in range(20000):
    say(console, f"line {number}")
print("done", file=sys.stderr)
"""


def test_a_pipe_that_is_closed_ends_nothing():
    process = subprocess.Popen(
        [sys.executable, "-c", PRINT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read() == "done\n"
    assert process.wait(60) == 0


def test_what_is_read_is_written(tmp_path):
    with (tmp_path / "file").open("w") as file:
        stream = Lasting(file)
        assert stream.write("words") == 5
        stream.flush()
        assert (tmp_path / "file").read_text() == "words"
        assert not stream.isatty()
        os.fstat(stream.fileno())
