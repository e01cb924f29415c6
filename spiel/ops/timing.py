"""How long a piece of work takes on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

#: Clock cycles, about a millisecond: enough for the CPU to launch all kernels of one run.
_HEAD_START_CYCLES = 2_000_000


def cuda_seconds(run: Callable[[], object], warmups: int = 2, repeats: int = 7) -> float:
    """The median time of `run` on the current CUDA device and stream, by CUDA events.

    The GPU waits before each run until its kernels are queued: in training it is behind the CPU
    too, so the time of launching is not counted, unless `run` itself waits for the GPU.
    """
    for _ in range(warmups):
        run()
    events = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START_CYCLES)
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000
