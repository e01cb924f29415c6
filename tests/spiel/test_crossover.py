"""The density at which the sampled kernel and the dense product take the same time."""

import json
import math
import sys
import warnings
from contextlib import nullcontext

import pytest
import torch

from spiel import ops
from spiel.ops import crossover, reference
from spiel.ops.crossover import DENSITIES, crossing, measure

CUDA = torch.device("cuda:0")
KEY = "Some GPU, bfloat16, torch 2, triton 3"


def test_between_two_densities_it_is_where_the_lines_meet():
    # Proportional to density against constant: straight lines in logarithms.
    sampled = [density * 50 for density in DENSITIES]
    for wanted in (0.002, 0.0065, 0.0199):
        found = crossing(DENSITIES, sampled, [wanted * 50] * len(DENSITIES))
        assert math.isclose(found, wanted, rel_tol=1e-9)


def test_outside_of_what_was_measured():
    ones = [1.0] * len(DENSITIES)
    assert crossing(DENSITIES, [2.0] * len(DENSITIES), ones) == 0.0
    assert crossing(DENSITIES, [0.5] * len(DENSITIES), ones) == DENSITIES[-1]


def test_noise_beyond_the_first_crossing_does_not_count():
    found = crossing((0.001, 0.01, 0.1), [0.5, 2.0, 0.9], [1.0, 1.0, 1.0])
    assert math.isclose(found, 10**-2.5, rel_tol=1e-9)


class Clock:
    """A timer on which the first function takes 10 s per wanted entry, the second always 300 s."""

    def __init__(self):
        self.num_entries = []

    def sampled(self, left, right, supports):
        (indices,) = supports
        assert torch.equal(indices, indices.unique())
        self.num_entries.append(len(indices))
        return 10.0 * len(indices)

    def dense(self, left, right, supports):
        (values,) = reference.sampled_gradients(left, right, supports)
        assert values.shape == supports[0].shape
        return 300.0

    def __call__(self, run):
        return run()


def test_measuring_times_both_at_every_density_and_leaves_random_numbers_alone():
    clock, before = Clock(), torch.get_rng_state()
    found = measure(
        clock.sampled, clock.dense, clock, torch.float32, shape=(4, 100, 100), device="cpu"
    )
    assert clock.num_entries == [10, 25, 65, 180, 500]
    assert math.isclose(found, 0.003, rel_tol=1e-9)
    assert torch.equal(torch.get_rng_state(), before)


# -- kept ------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as the rule sees it; `measured` says how often it was measured, and found 0.004."""

    class Gpu:
        measured = 0
        is_capturing = False
        file = tmp_path / "spiel" / "crossover.json"

    def fake_measure(*args):
        Gpu.measured += 1
        return 0.004

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(crossover, "_known", {})
    monkeypatch.setattr(crossover, "machine_key", lambda device, dtype: KEY)
    monkeypatch.setattr(crossover, "measure", fake_measure)
    monkeypatch.setattr(crossover, "kernels_run", lambda device: True)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Gpu.is_capturing)
    return Gpu


def forget():
    crossover._known.clear()


def choose(density):
    return ops.choose_backend(CUDA, int(density * 10**6), 10**6, torch.bfloat16)


def test_it_is_measured_once_and_kept_in_the_file(gpu):
    assert [choose(0.0039), choose(0.0041)] == ["triton", "blocked"]
    assert json.loads(gpu.file.read_text()) == {KEY: 0.004}
    assert list(gpu.file.parent.iterdir()) == [gpu.file]
    forget()
    assert choose(0.0039) == "triton"
    assert gpu.measured == 1


def test_what_the_file_says_about_others_stays(gpu):
    gpu.file.parent.mkdir()
    gpu.file.write_text('{"another": 0.01}')
    choose(0.001)
    assert json.loads(gpu.file.read_text()) == {"another": 0.01, KEY: 0.004}


@pytest.mark.parametrize(
    "text", ["", '{"So', "[1]", "\0", json.dumps({KEY: "0.1"}), json.dumps({KEY: math.nan})]
)
def test_a_damaged_file_is_measured_and_written_again(gpu, text):
    gpu.file.parent.mkdir()
    gpu.file.write_text(text)
    assert choose(0.0039) == "triton"
    assert gpu.measured == 1
    assert json.loads(gpu.file.read_text()) == {KEY: 0.004}


def test_a_folder_that_cannot_be_written_or_does_not_exist_is_done_without(gpu, monkeypatch):
    gpu.file.parent.write_text("a file where the folder should be")
    assert [choose(0.0039), choose(0.0041)] == ["triton", "blocked"]

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    forget()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(crossover.Path, "home", no_home)
    assert [choose(0.0039), choose(0.0041)] == ["triton", "blocked"]
    assert gpu.measured == 2


def test_nothing_is_measured_while_a_graph_is_captured(gpu):
    gpu.is_capturing = True
    assert [choose(0.007), choose(0.009)] == ["triton", "blocked"]
    assert gpu.measured == 0
    gpu.is_capturing = False
    assert choose(0.007) == "blocked"
    assert gpu.measured == 1


def test_what_cannot_be_measured_is_said_once_and_not_kept(gpu, monkeypatch):
    def fail(*args):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(crossover, "measure", fail)
    with pytest.warns(UserWarning, match="blocked dense product: RuntimeError: Failed to find C"):
        assert choose(0.0001) == "blocked"
    assert choose(0.0001) == "blocked"
    assert not gpu.file.exists()


def test_without_triton_the_dense_product_runs(gpu, monkeypatch):
    monkeypatch.setattr(crossover, "kernels_run", lambda device: False)
    assert choose(0.0001) == "blocked"
    assert gpu.measured == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_measured(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(crossover, "_known", {})
    before = torch.cuda.get_rng_state()
    density = crossover.crossover_density(CUDA, torch.bfloat16)
    assert 0 <= density <= DENSITIES[-1]
    assert torch.equal(torch.cuda.get_rng_state(), before)
    (key,) = json.loads(crossover.cache_file().read_text())
    assert torch.cuda.get_device_name(CUDA) in key


class TriedKernels:
    """What `spiel.ops.triton_kernels` may turn out to be on a machine."""

    def __init__(self, action):
        self.write_entries, self.num_calls = self.count(action), 0

    def count(self, action):
        def write_entries(weight, indices, originals, deltas):
            self.num_calls += 1
            action(weight, indices, originals + deltas)

        return write_entries


def fail(*_):
    raise RuntimeError("no C compiler")


@pytest.mark.parametrize(
    ("action", "runs"),
    [(lambda w, i, v: w.view(-1).put_(i.long(), v), True), (lambda *_: None, False), (fail, False)],
)
def test_kernels_are_tried_once_and_used_only_where_they_run(action, runs, monkeypatch):
    tried = TriedKernels(action)
    monkeypatch.setitem(sys.modules, "spiel.ops.triton_kernels", tried)
    monkeypatch.setattr(ops, "triton_kernels", tried, raising=False)
    monkeypatch.setattr(crossover, "_runs", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(crossover, "has_triton", lambda: True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert [crossover.kernels_run(torch.device("cpu")) for _ in range(2)] == [runs, runs]
    assert tried.num_calls == 1
    assert ["no C compiler" in str(each.message) for each in said] == [True] * (action is fail)


def test_the_crossover_is_measured_again_for_other_code(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    keys = set()
    for text in "ab":
        for name in ("triton_kernels.py", "blocked.py"):
            (tmp_path / name).write_text("same")
        for name in ("blocked.py", "triton_kernels.py"):
            (tmp_path / name).write_text(text + name)
            monkeypatch.setattr(crossover, "__file__", str(tmp_path / "crossover.py"))
            crossover.machine_key.cache_clear()
            keys.add(crossover.machine_key(torch.device("cpu"), torch.float32))
    crossover.machine_key.cache_clear()
    assert len(keys) == 4


def test_the_crossover_is_one_for_each_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    crossover.machine_key.cache_clear()
    keys = {
        crossover.machine_key(torch.device("cpu"), own) for own in (torch.float32, torch.bfloat16)
    }
    crossover.machine_key.cache_clear()
    assert len(keys) == 2
