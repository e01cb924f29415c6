"""Two data-parallel ranks hold one support, and train as one process does on the whole batch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "ddp_worker.py"


def load_worker():
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_two_ranks_train_as_one_process(growth, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, WORKER, growth, tmp_path], check=True, timeout=200, env=environment)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = load_worker().deltas_after_training(growth, 0, 1)
    for name, (indices, values) in alone.items():
        for rank in ranks:
            assert torch.equal(rank[name][0], indices), name
            torch.testing.assert_close(rank[name][1], values, rtol=1e-3, atol=1e-6)
        assert torch.equal(ranks[0][name][1], ranks[1][name][1]), name
