"""The meter: seconds and peak memory by phase, seconds by train step, bytes kept for backward.

Time is charged to who spends it. A step runs from before the method's first callback to after
its last, with the device synchronised at both ends; fetching data, logging and evaluation lie
outside it.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback

from suites.record import PhaseCost


def synchronize(device: str) -> None:
    """Waits until the device has done what it was asked; a CPU always has."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Meter:
    """Costs by phase; `phases` grows as they end, so that a failed cell still tells its own."""

    def __init__(self, device: str, on_phase: Callable[[str], None]) -> None:
        self.device = device
        self.on_phase = on_phase
        self.phases: dict[str, PhaseCost] = {}
        self._floor_bytes = psutil.Process().memory_info().rss

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the body of the `with` as the phase `name`."""
        self.on_phase(name)
        peak = _CudaPeak(self.device) if self.device.startswith("cuda") else _resident_peak()
        synchronize(self.device)
        start = time.perf_counter()
        try:
            yield
            synchronize(self.device)
        finally:
            seconds = time.perf_counter() - start
            self.phases[name] = PhaseCost(seconds, *peak.stop(self._floor_bytes))


class _CudaPeak:
    """Peak bytes of torch's CUDA allocator since this was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    def stop(self, floor_bytes: int) -> tuple[int, int]:
        allocated = torch.cuda.max_memory_allocated(self.device)
        return allocated, torch.cuda.max_memory_reserved(self.device)


class _KernelPeak:
    """Peak resident bytes since this was made, as Linux itself keeps them (VmHWM)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now

    def stop(self, floor_bytes: int) -> tuple[int, None]:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return max(0, int(line.split()[1]) * 1024 - floor_bytes), None
        raise OSError("/proc/self/status has no VmHWM")


class _SampledPeak:
    """Peak resident bytes as a thread sees them every 5 ms, where the kernel does not tell."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._peak_bytes = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.005):
            self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)

    def stop(self, floor_bytes: int) -> tuple[int, None]:
        self._ended.set()
        self._thread.join()
        return max(0, self._peak_bytes - floor_bytes), None


def _resident_peak() -> _KernelPeak | _SampledPeak:
    try:
        return _KernelPeak()
    except OSError:
        return _SampledPeak()


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
        self._marks: list[tuple[Any, Any]] = []
        self._start = 0.0
        self._open: Any = None

    def open_step(self) -> None:
        synchronize(self.device)
        self._marks.clear()
        self._start = time.perf_counter()

    def open_callbacks(self) -> None:
        self._open = self._mark()

    def close_callbacks(self) -> None:
        self._marks.append((self._open, self._mark()))

    def close_step(self) -> None:
        synchronize(self.device)
        self.step_seconds.append(time.perf_counter() - self._start)
        self.callback_seconds.append(sum(self._between(*marks) for marks in self._marks))

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


def saved_for_backward_bytes(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> int:
    """Bytes that autograd keeps between the forward pass of one train batch and its backward.

    Every storage counts once, and those of the model's own parameters and buffers not at all.
    Nothing stays changed: no backward pass follows and the random state is put back.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in _tensors_of(model)}
    saved: dict[int, torch.UntypedStorage] = {}  # holding them keeps addresses from being reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage
        return tensor

    was_training = model.training
    model.train()
    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        model(**batch)
    model.train(was_training)
    return sum(storage.nbytes() for storage in saved.values())


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    if tensor.layout is torch.sparse_coo:  # it has none of its own (SHiRA keeps such)
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.untyped_storage()]


def _tensors_of(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimiser's state, every storage once."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def artifact_bytes(write_artifact: Callable[[Path], None]) -> int:
    """Bytes of the files that `write_artifact` leaves in the folder it is given."""
    with tempfile.TemporaryDirectory() as folder:
        write_artifact(Path(folder))
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
