"""The meter: seconds and peak memory by phase; bytes for the backward pass, state and files."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from suites.record import PhaseCost
from suites.values import given


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
        self._open: _OpenPhase | None = None

    @contextmanager
    def phase(self, name: str, earlier: PhaseCost | None = None) -> Iterator[None]:
        """Measures the body of the `with` as the phase `name`.

        `earlier` is what it had cost before it was interrupted and resumed.
        """
        self.on_phase(name)
        peak = _CudaPeak(self.device) if self.device.startswith("cuda") else _resident_peak()
        synchronize(self.device)
        self._open = _OpenPhase(peak, time.perf_counter(), earlier)
        try:
            yield
            synchronize(self.device)
        finally:
            self.phases[name] = self.cost_so_far()
            peak.close()

    def cost_so_far(self) -> PhaseCost:
        """What the phase under way has cost until now."""
        assert self._open is not None, "no phase is under way"
        peak, start, earlier = self._open
        cost = PhaseCost(time.perf_counter() - start, *peak.read(self._floor_bytes))
        return cost if earlier is None else joined(earlier, cost)


class _OpenPhase(NamedTuple):
    peak: _CudaPeak | _KernelPeak | _SampledPeak
    start: float
    earlier: PhaseCost | None


def joined(first: PhaseCost, second: PhaseCost) -> PhaseCost:
    """The cost of a phase done in two sittings."""
    reserved = [cost.peak_reserved_bytes for cost in (first, second)]
    return PhaseCost(
        first.seconds + second.seconds,
        max(first.peak_bytes or 0, second.peak_bytes or 0),
        None if None in reserved else max(map(given, reserved)),
    )


class _CudaPeak:
    """Peak bytes of torch's CUDA allocator since this was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)

    def close(self) -> None:
        """Nothing runs that would have to end."""

    def read(self, floor_bytes: int) -> tuple[int, int]:
        allocated = torch.cuda.max_memory_allocated(self.device)
        return allocated, torch.cuda.max_memory_reserved(self.device)


class _KernelPeak:
    """Peak resident bytes since this was made, as Linux itself keeps them (VmHWM)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is resident now

    def close(self) -> None:
        """Nothing runs that would have to end."""

    def read(self, floor_bytes: int) -> tuple[int, None]:
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

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    def read(self, floor_bytes: int) -> tuple[int, None]:
        return max(0, self._peak_bytes - floor_bytes), None


def _resident_peak() -> _KernelPeak | _SampledPeak:
    try:
        return _KernelPeak()
    except OSError:
        return _SampledPeak()


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

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    unpack.changes_nothing = True  # type: ignore[attr-defined]  # tells spiel.recompute
    was_training = model.training
    model.train()
    with (
        torch.random.fork_rng(),
        torch.autograd.graph.saved_tensors_hooks(pack, unpack),
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


def artifact_bytes(write_artifact: Callable[[Path], None], keep: Path | None) -> int | None:
    """Bytes of the files that `write_artifact` leaves in the folder it is given.

    That becomes `keep`, in place of what was there, or is removed if that is None. None where they
    could not be written (there is no room), which is no reason to lose a training; then `keep` is
    as it was.
    """
    try:
        with _room_for(keep) as folder:
            write_artifact(folder)
            num_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            if keep is not None:
                shutil.rmtree(keep, ignore_errors=True)
                folder.rename(keep)
        return num_bytes
    except Exception:  # of the system, torch, or safetensors
        traceback.print_exc()
        return None


@contextmanager
def _room_for(keep: Path | None) -> Iterator[Path]:
    """An empty folder that is removed at the end: beside `keep`, which it can be renamed to, and
    where the next one finds what a kill left.
    """
    folder = Path(tempfile.mkdtemp()) if keep is None else keep.with_name(f".{keep.name}")
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
