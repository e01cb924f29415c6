"""Each op alone, as a ratio to the dense product of the same operands measured in turn with it.

The crossovers that `spiel.ops` chooses by on a CPU are read off here.
"""

import os
import statistics
import time

import pytest
import torch

from spiel import SpielAdamW, ops
from spiel.live import LiveEntries
from spiel.ops import blocked, optional
from spiel.support import random_support

TOKENS, ROWS, COLS = 1024, 1376, 512
DENSITIES = (0.001, 0.0025, 0.0063, 0.016, 0.04, 0.1, 0.16, 0.25, 0.4, 0.6)
ROUNDS = 15
SPARSE = [name for name in ("compiled", "sampled") if name == "sampled" or optional.has_numba()]


@pytest.fixture(scope="module", autouse=True)
def all_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def operands():
    torch.manual_seed(0)
    return torch.randn(TOKENS, ROWS), torch.randn(TOKENS, COLS)


def in_turn(*runs):
    """Median seconds of each of `runs`, which take turns."""
    seconds = [[] for _ in runs]
    for number in range(ROUNDS + 2):
        for run, own in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if number >= 2:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in seconds]


def by(backend, operands, indices):
    def run():
        ops.forget()  # as if no other module shared them
        with ops.use_backend(backend):
            ops.sampled_gradient(*operands, indices)

    return run


@pytest.mark.parametrize("backend", SPARSE)
def test_sampled_gradient_against_the_dense_product(benchmark, operands, backend):
    ratios = {}
    for density in DENSITIES:
        indices = random_support(int(density * ROWS * COLS), ROWS * COLS)
        own, dense = in_turn(by(backend, operands, indices), by("blocked", operands, indices))
        ratios[f"{backend} / blocked at density {density}"] = round(own / dense, 3)
    benchmark.extra_info.update(ratios)
    indices = random_support(ROWS * COLS // 100, ROWS * COLS)
    benchmark.pedantic(by(backend, operands, indices), rounds=5)
    print(ratios)
    limit = ops.CPU_MAX_DENSITY[backend]
    below = [ratios[f"{backend} / blocked at density {d}"] for d in DENSITIES if d <= limit / 1.5]
    assert max(below) < 1.1, "the rule takes the slower one"


def test_largest_gradients(benchmark, operands):
    left, right = operands
    own, dense = in_turn(
        lambda: blocked.largest_gradients(left, right, 17_371), lambda: left.t() @ right
    )
    benchmark.extra_info["largest gradients / dense product"] = round(own / dense, 3)
    benchmark.pedantic(blocked.largest_gradients, (left, right, 17_371), rounds=5)
    print(own / dense)
    assert own < 4 * dense


def test_update_and_writing_at_a_density_of_one_percent(benchmark, operands):
    """All of a model's deltas: the update, and the write into its live weights."""
    left, _ = operands
    num_layers, k = 42, ROWS * COLS // 100
    weights = [torch.randn(ROWS, COLS) for _ in range(num_layers)]
    deltas = [torch.nn.Parameter(torch.zeros(k)) for _ in weights]
    entries = [LiveEntries(w, {"own": random_support(k, ROWS * COLS)}) for w in weights]
    optimizer = SpielAdamW(deltas, lr=1e-4)
    for own in deltas:
        own.grad = torch.randn(k)

    def update_and_write():
        optimizer.step()
        for each, own in zip(entries, deltas, strict=True):
            each.write({"own": own})

    def forward_and_back():  # of the layers alone: the output, and the gradient of the input
        for weight in weights:
            (left @ weight) @ weight.t()

    own, step = in_turn(update_and_write, forward_and_back)
    benchmark.extra_info["update and writing / products of a step"] = round(own / step, 4)
    benchmark.pedantic(update_and_write, rounds=5)
    print(own / step)
    assert own < 0.03 * step
