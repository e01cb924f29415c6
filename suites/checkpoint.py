"""Checkpoints of a cell under way: when they are written, and from which one it may go on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from suites.measure import Meter
from suites.provenance import Environment
from suites.record import PhaseCost, now, write_whole
from suites.steps import StepMeter

#: Written last: a checkpoint without it was not finished. It knows the hashes of the other files,
#: since a disk may lose what was written to them when the power fails.
HISTORY = "history.json"


@dataclasses.dataclass(frozen=True)
class History:
    """What a checkpoint must know of the measurements so far, beside the Trainer's own state."""

    #: When the cell was begun.
    started_at: str
    #: The steps at which it was resumed.
    resumed_at: tuple[int, ...] = ()
    step_seconds: tuple[float, ...] = ()
    callback_seconds: tuple[float, ...] = ()
    first_step_flops: int | None = None
    #: Of the phase `train` until now.
    cost: PhaseCost | None = None
    #: The Trainer's checkpoint to go on from.
    folder: Path | None = None


class Checkpoints(TrainerCallback):
    """Saves every `every_seconds` of training (None: never), keeping the newest checkpoint only.

    Put it behind the meter's `closing`: no step is charged for it. A checkpoint that was made by
    other code, on other hardware, or in another world is not gone on from, because a record must
    be able to say of all its steps what made them. It stays until training is past its step.

    Attributes:
        history: of the checkpoint to go on from, or of none, as if begun `anew`.
        passed_over: the steps of checkpoints that others made.
    """

    def __init__(
        self,
        folder: Path,
        every_seconds: float | None,
        environment: Environment,
        world: str | None,
        is_main: bool = True,
        anew: bool = False,
    ) -> None:
        self.folder, self.every_seconds, self.is_main = folder, every_seconds, is_main
        made_by = [environment.code_hash, environment.hardware, environment.packages, world]
        self.made_by = json.loads(json.dumps(made_by))
        self.passed_over: list[int] = []
        found = None if anew else self._newest()
        self.history = found or History(started_at=now())
        self._saved_at = 0.0
        self._given_up = 0  # the last step whose checkpoint could not be written
        self._meters: tuple[Meter, StepMeter] | None = None

    def attach(self, meter: Meter, steps: StepMeter) -> None:
        """Puts the measurements of the checkpoint into `steps`; saves what both have from now."""
        history, self._meters = self.history, (meter, steps)
        steps.step_seconds[:] = history.step_seconds
        steps.callback_seconds[:] = history.callback_seconds
        steps.first_step_flops = history.first_step_flops

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every_seconds is not None and state.global_step < state.max_steps:
            control.should_save = self._is_due()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved_at = time.monotonic()
        _wait_for_ranks()  # each of them writes a file of its own
        newest = self.folder / f"checkpoint-{state.global_step}"
        if not self.is_main or state.global_step == self._given_up:
            return
        try:
            _flush(newest)
            history = dataclasses.asdict(self._now())
            values = {"made_by": self.made_by, "files": _digests(newest), "history": history}
            write_whole(json.dumps(values), newest / HISTORY)
        except OSError as error:
            self.give_up(state.global_step, error)
            return
        for older in self.folder.glob("checkpoint-*"):
            if _step(older) < state.global_step:
                shutil.rmtree(older, ignore_errors=True)

    def give_up(self, step: int, error: Exception) -> None:
        """Removes what was written of a checkpoint that cannot be; the one before it stays."""
        self._given_up = step
        shutil.rmtree(self.folder / f"checkpoint-{step}", ignore_errors=True)
        print(f"checkpoint of step {step} not written: {error}", file=sys.stderr)

    def _is_due(self) -> bool:
        """Whether to save now; ranks, whose clocks differ, do as the main one does."""
        assert self.every_seconds is not None
        due = time.monotonic() - self._saved_at >= self.every_seconds
        if not (dist.is_available() and dist.is_initialized()):
            return due
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flag = torch.tensor([due], dtype=torch.uint8, device=device)
        dist.broadcast(flag, src=0)
        return bool(flag.item())

    def _now(self) -> History:
        assert self._meters is not None, "attach comes first"
        meter, steps = self._meters
        return dataclasses.replace(
            self.history,
            step_seconds=tuple(steps.step_seconds),
            callback_seconds=tuple(steps.callback_seconds),
            first_step_flops=steps.first_step_flops,
            cost=meter.cost_so_far(),
            folder=None,
        )

    def _newest(self) -> History | None:
        """The history of the newest whole checkpoint that this cell may go on from."""
        found = []
        for path in self.folder.glob(f"checkpoint-*/{HISTORY}"):
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                continue  # a disk that lost what was written to it
            if values["made_by"] != self.made_by:
                self.passed_over.append(_step(path.parent))
            elif _is_whole(path.parent, values):
                found.append((_step(path.parent), path.parent, values))
        if not found:
            return None
        step, folder, values = max(found, key=lambda each: each[0])
        history = {**values["history"], "folder": folder}
        history["cost"] = PhaseCost(**history["cost"])
        for name in ("resumed_at", "step_seconds", "callback_seconds"):
            history[name] = tuple(history[name])
        history["resumed_at"] += (step,)
        return History(**history)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def _wait_for_ranks() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def _files(folder: Path) -> list[Path]:
    """Those of the checkpoint in `folder`, without its history."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != HISTORY]


def _flush(folder: Path) -> None:
    """Has the disk hold what was written to the files of `folder`."""
    for path in _files(folder):
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _digests(folder: Path) -> dict[str, str]:
    """Name -> SHA-256: a file may have its size and lack what was written to it."""
    found = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[path.relative_to(folder).as_posix()] = digest
    return found


def _is_whole(folder: Path, values: dict[str, Any]) -> bool:
    """Whether the files of `folder` are those that its history knows."""
    files = values.get("files")
    return files is not None and files.items() <= _digests(folder).items()
