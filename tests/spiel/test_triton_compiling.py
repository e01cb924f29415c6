"""The Triton kernels compile to machine code of real GPUs, which takes none of them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import spiel

pytest.importorskip("triton")

WORKER = Path(__file__).parent / "triton_worker.py"


def test_every_kernel_compiles_for_gpus(tmp_path):
    here = str(Path(spiel.__file__).parents[1])
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, WORKER], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [line.split() for line in done.stdout.splitlines()]
    assert {line[0] for line in compiled} == {"transpose", "sampled", "write"}
    assert len(compiled) == 5 * 3 + 5 + 1
    assert min(int(line[-1]) for line in compiled) > 1000
