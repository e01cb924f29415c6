"""How numba's kernels share their work among threads, and how many these are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import torch


def with_prange(function: Callable[..., Any]) -> Any:
    """numba.njit for a function with a loop over `prange`, the one thing that threads share. By
    itself numba would share every sum, copy and array of zeros too, at a cost above their own.
    """
    others = "comprehension", "fusion", "inplace_binop", "numpy", "reduction", "setitem", "stencil"
    parallel: Any = {"prange": True, **dict.fromkeys(others, False)}  # numba's stub knows bool only
    return numba.njit(nogil=True, cache=True, parallel=parallel)(function)


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
