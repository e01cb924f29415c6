"""How many threads numba's kernels take."""

from __future__ import annotations

import threading

import numba
import torch


class _Known(threading.local):
    asked = num_threads = 0


_known = _Known()


def set_threads() -> int:
    """Has the kernels called by this thread take as many as torch does, if numba has them."""
    if _known.asked != torch.get_num_threads():
        _known.asked = torch.get_num_threads()
        _known.num_threads = min(_known.asked, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        numba.set_num_threads(_known.num_threads)
        # At its first call numba sets OpenMP's number of threads, which is torch's too.
        torch.set_num_threads(_known.asked)
    return _known.num_threads
