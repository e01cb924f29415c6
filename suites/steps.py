"""The stop-watch of train steps: seconds and operations of each, and the callbacks' share.

Time is charged to who spends it. A step runs from before the method's first callback to after
its last, with the device synchronised at both ends; fetching data, logging, checkpoints and
evaluation lie outside it.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from suites.measure import synchronize


class StepMeter:
    """Seconds of every train step, and what the method's callbacks took of them.

    Put `opening` before the method's callbacks and `closing` after them. On CUDA the callbacks'
    time is taken by events, so that timing them adds no synchronisation inside a step.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.step_seconds: list[float] = []
        self.callback_seconds: list[float] = []
        self.opening = _Opening(self)
        self.closing = _Closing(self)
        #: Of the whole first step, as torch counts them; None where it cannot. What kernels of
        #: our own do it does not see.
        self.first_step_flops: int | None = None
        self._counter: FlopCounterMode | None = None
        self._marks: list[tuple[Any, Any]] = []
        self._start = 0.0
        self._open: Any = None

    def open_step(self) -> None:
        if not self.step_seconds:
            self._counter = FlopCounterMode(display=False)
            self._counter.__enter__()
        synchronize(self.device)
        self._marks.clear()
        self._start = time.perf_counter()

    def open_callbacks(self) -> None:
        self._open = self._mark()

    def close_callbacks(self) -> None:
        self._marks.append((self._open, self._mark()))

    def close_step(self) -> None:
        synchronize(self.device)
        self.stop_counting()
        self.step_seconds.append(time.perf_counter() - self._start)
        self.callback_seconds.append(sum(self._between(*marks) for marks in self._marks))

    def stop_counting(self) -> None:
        """Ends the count of the first step, also of one that failed halfway."""
        if self._counter is not None:
            self._counter.__exit__(None, None, None)
            self.first_step_flops = self._counter.get_total_flops() or None
            self._counter = None

    def _mark(self) -> Any:
        if not self.device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        if isinstance(start, float):
            return end - start
        return start.elapsed_time(end) / 1000  # CUDA's are milliseconds


class _Opening(TrainerCallback):
    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.meter.open_step()
        self.meter.open_callbacks()

    def _open(self, *_: Any, **__: Any) -> None:
        self.meter.open_callbacks()

    on_substep_end = on_pre_optimizer_step = on_optimizer_step = on_step_end = _open


class _Closing(TrainerCallback):
    def __init__(self, meter: StepMeter) -> None:
        self.meter = meter

    def _close(self, *_: Any, **__: Any) -> None:
        self.meter.close_callbacks()

    on_step_begin = on_substep_end = on_pre_optimizer_step = on_optimizer_step = _close

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.meter.close_callbacks()
        self.meter.close_step()
