"""The yardstick: how fast the machine itself is just now, by work that is always the same.

Machines are shared, and processors slow down when they get hot. What a yardstick taken beside each
cell's train steps says of the machine tells whether the cells' run times may be compared.
"""

from __future__ import annotations

import statistics
import time

import torch

from suites.measure import synchronize

#: Square matrices of this width and dtype are multiplied: for some 10 ms on 2 cores, and below a
#: millisecond on a data-centre GPU.
CPU_WORK, GPU_WORK = (768, torch.float32), (4096, torch.bfloat16)
NUM_WARM_UPS, NUM_PRODUCTS = 1, 7


def product_seconds(device: str) -> float:
    """Median seconds of one matrix product, with as many threads as torch uses here."""
    width, dtype = GPU_WORK if device.startswith("cuda") else CPU_WORK
    matrix = torch.ones(width, width, dtype=dtype, device=device)
    out = torch.empty_like(matrix)
    seconds = []
    for _ in range(NUM_WARM_UPS + NUM_PRODUCTS):
        synchronize(device)
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=out)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[NUM_WARM_UPS:])
