"""A cell on several processes: the same batches, losses and scores as on one."""

import os

import numpy as np
import pytest

from suites import distributed, record, run, runner
from suites.distributed import Rank, share
from suites.plan import Execution
from suites.progress import LineProgress
from suites.provenance import environment
from suites.suite import Recipe
from tests.suites.arena import cell, small_suite

TWO = Execution(num_processes=2)


class Silent:
    def print(self, *_, **__):
        pass


@pytest.fixture
def train(monkeypatch, world_cache, tmp_path):
    monkeypatch.setenv("SPIEL_CACHE", str(world_cache))

    def train(method, way, **recipe):
        suite = small_suite(recipe=Recipe(**{"num_steps": 12, "batch_size": 4, **recipe}))
        of, out = cell(method, suite=suite), tmp_path / str(way.num_processes)
        runner.run([of], out, way, LineProgress(Silent(), [of]))
        return record.read(of.record_path(out))

    return train


@pytest.mark.parametrize("method", ["lora", "spiel"])
def test_two_processes_train_as_one(train, method):
    one, two = train(method, Execution()), train(method, TWO)
    assert (one.status, two.status, two.reason) == ("ok", "ok", "")
    np.testing.assert_allclose(two.training.losses, one.training.losses, rtol=2e-4)
    assert two.training.num_tokens == one.training.num_tokens
    assert two.training.first_step_flops == pytest.approx(one.training.first_step_flops, rel=0.1)
    assert two.size.num_trainable == one.size.num_trainable
    assert set(two.scores) == set(one.scores)
    for name, score in two.scores.items():
        assert score.value == pytest.approx(one.scores[name].value, abs=0.1)
    assert two.environment.hardware == f"{one.environment.hardware}, 2 processes"


def test_accumulated_batches_are_shared_too(train):
    recipe = {"batch_size": 1, "gradient_accumulation_steps": 4}
    one, two = train("full", Execution(), **recipe), train("full", TWO, **recipe)
    np.testing.assert_allclose(two.training.losses, one.training.losses, rtol=2e-4)


@pytest.mark.parametrize(("method", "status"), [("raising", "failed"), ("diverging", "diverged")])
def test_failures_of_ranks_are_told(train, method, status):
    found = train(method, TWO)
    assert found.status == status
    assert ("no such luck" if status == "failed" else "the loss is nan") in found.reason


def test_shares():
    assert share(8, 3, 2) == (4, 3)
    assert share(1, 128, 4) == (1, 32)
    with pytest.raises(ValueError, match="2 cannot share a batch of 1 that is accumulated 3 times"):
        share(1, 3, 2)


def test_what_cannot_be_shared_stops_before_training(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(run.SUITES, "small", small_suite())
    arguments = ["small", "--methods", "lora", "--processes", "3", "--out", str(tmp_path)]
    assert run.main(arguments) == 2
    assert "--processes: 3 cannot share a batch of 4" in capsys.readouterr().err


def test_gpus_that_there_are_not(monkeypatch, tmp_path, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setitem(run.SUITES, "small", small_suite())
    arguments = ["small", "--methods", "lora", "--device", "cuda:1", "--out", str(tmp_path)]
    assert run.main(arguments) == 2
    assert "--device: 'cuda:1' is not here, torch sees no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="3 need a GPU each, torch sees 2"):
        distributed.check_device(None, 3)
    with pytest.raises(ValueError, match="2 need a GPU each from cuda:1 on, torch sees 2"):
        distributed.check_device("cuda:1", 2)
    with pytest.raises(ValueError, match="'cuda:2' is not here, torch sees GPUs 0 to 1"):
        distributed.check_device("cuda:2", 1)
    distributed.check_device("cuda:1", 1)


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    Rank(0, 2).show_gpus("cuda:1")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    Rank().show_gpus("cuda:3")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # none is to be seen
    Rank().show_gpus(None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_a_plan_describes_the_gpus_as_records_will(monkeypatch):
    import torch

    from suites.preview import _here

    names = ["A", "B", "C", "C"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", names.__getitem__)
    planned = _here("cuda:2", 2)
    del names[:2]  # as a child sees them
    assert planned == environment("cuda:0", 2)
    assert planned.gpus == ("C", "C")
