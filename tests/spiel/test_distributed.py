"""Two data-parallel ranks hold one support, and train as one process does on the whole batch."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spiel

WORKER = Path(__file__).parent / "ddp_worker.py"


def load_worker():
    spec = importlib.util.spec_from_file_location("ddp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    here = str(Path(spiel.__file__).parents[1])  # the ranks import what this process imports
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": here}
    subprocess.run([*command, WORKER, folder], check=True, timeout=200, env=environment)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("growth", ["ag", "ma"])
def test_two_ranks_train_as_one_process(growth, ranks):
    one, other = (rank[growth] for rank in ranks)
    alone = load_worker().deltas_after_training(growth, 0, 1)
    for name, (indices, values) in alone.items():
        for rank in (one, other):
            assert torch.equal(rank[name][0], indices), name
            torch.testing.assert_close(rank[name][1], values, rtol=1e-3, atol=1e-6)
        assert torch.equal(one[name][1], other[name][1]), name


@pytest.mark.parametrize(
    "case", ["never at once", "at once", "never at once, last", "at once, last"]
)
def test_ranks_agree_though_some_have_no_use_for_a_module(case, ranks):
    one, other = (rank[case] for rank in ranks)
    for name, (indices, values) in one.items():
        assert torch.equal(other[name][0], indices), name
        assert torch.equal(other[name][1], values), name
        assert bool(values.any()), name


def test_sharded_weights_are_refused(ranks):
    for rank in ranks:
        named, wrapped = rank["refusals"]
        assert "first is sharded: SpIEL trains in data-parallel processes" in named
        assert "the model is sharded" in wrapped
