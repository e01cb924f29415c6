"""Child processes are forked from one that has loaded the libraries, once and for all of them."""

import gc
import os
import pickle
import subprocess
import sys

import pytest

from suites import children, record
from suites.distributed import Rank
from suites.plan import Execution
from tests.suites.arena import cell, small_suite

#: A process that finds a GPU's driver, and remembers which GPUs are shown when CUDA is asked.
ON_A_GPU = """
import ctypes.util, os, pickle, sys, torch
asked = []
def ask():
    asked.append(os.environ.get("CUDA_VISIBLE_DEVICES"))
    return 0
ctypes.util.find_library = lambda name: "libcuda.so.1"
torch.cuda.device_count = ask
torch.cuda.is_available = lambda: bool(ask())
"""


def look(connection):
    from suites.libraries import LIBRARIES  # here: it keeps the collector from what is loaded

    connection.send([name for name in LIBRARIES if name not in sys.modules])
    connection.send((gc.isenabled(), gc.get_freeze_count() > 100_000))


def test_a_child_has_the_libraries_and_does_not_look_for_garbage_among_them(tmp_path):
    heard = []
    chosen = children.context(tmp_path / "libraries.log")
    assert children.run_child(chosen, look, [()], heard.append) == 0
    assert heard == [[], (True, True)]


@pytest.mark.parametrize(("name", "are_wanted"), [("footprint_tiny", True), ("quickstart", False)])
def test_kernels_are_compiled_before_cells_if_these_want_them(name, are_wanted, tmp_path):
    """Not by a cell, whose memory it would count as; small models are spared them."""
    script = """if True:
        import sys
        from pathlib import Path
        from suites import workers
        from suites.catalog import SUITES
        workers.compile_kernels(SUITES[sys.argv[1]], Path(sys.argv[2]) / "log", None)
    """
    kept = tmp_path / "kept"
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(kept)}
    code = [sys.executable, "-c", script, name, str(tmp_path)]
    subprocess.run(code, env=environment, check=True, timeout=240)
    found = {path.name.partition(".")[2].partition("-")[0] for path in kept.rglob("*.nbc")}
    assert ("_products" in found and "_write_sums" in found) is are_wanted, found


def on_a_gpu(script, given=b""):
    code = [sys.executable, "-c", ON_A_GPU + script]
    done = subprocess.run(code, input=given, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def test_before_children_are_forked_nobody_asks_cuda():
    """Whose CUDA would not work: bitsandbytes asks, where it is installed."""
    script = "import suites.libraries; print(asked, 'peft' in sys.modules)"
    assert on_a_gpu(script) == "[] False\n"
    assert "[None" in on_a_gpu("import peft; print(asked)")  # so this would be seen


def test_a_cell_sees_its_own_gpus_alone_from_the_first_time_that_cuda_is_asked(tmp_path):
    of = cell("lora", suite=small_suite(device="cuda:5"))
    arguments = pickle.dumps((of, None, tmp_path, Execution(num_processes=2), Rank(0, 2)))
    script = """
from multiprocessing import Pipe
from suites import workers
kept, pipe = os.dup(1), Pipe()
workers.run_cell(*pickle.load(sys.stdin.buffer), pipe[1])
os.write(kept, repr(set(asked)).encode())
"""
    assert on_a_gpu(script, arguments) == "{'5,6'}"
    found = record.read(of.record_path(tmp_path))
    assert found.reason.endswith("'cuda:5' is not here: torch sees no such GPU")


@pytest.mark.parametrize(
    ("wanted", "shown"), [(None, "4,5"), ("cuda:1", "5,6"), ("cpu", "4,5,6,7")]
)
def test_ranks_see_the_gpus_from_the_first_wanted_on(monkeypatch, wanted, shown):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    Rank(0, 2).show_gpus(wanted)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
