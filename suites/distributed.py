"""Data-parallel ranks: what tells torch and accelerate which one a process is, and where."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

HOST = "127.0.0.1"
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Rank:
    """One of the processes that train a cell together; they meet at `port` of this machine."""

    index: int = 0
    num_ranks: int = 1
    port: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that evaluates and writes the record."""
        return self.index == 0

    def show_gpus(self, wanted: str | None) -> None:
        """Hides all GPUs but those of the ranks, which are cuda:0, cuda:1, ... from then on: the
        Trainer of one process would spread over all.

        This has to come before the process asks CUDA for anything, as it does when it imports
        bitsandbytes. `wanted` as for `join`.
        """
        if wanted == "cpu":
            return
        first, visible = first_gpu(wanted), os.environ.get("CUDA_VISIBLE_DEVICES")
        shown = [str(gpu) for gpu in range(first, first + self.num_ranks)]
        if visible is not None:
            shown = visible.split(",")[first : first + self.num_ranks]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(shown)

    def join(self, wanted: str | None) -> str:
        """The device this rank trains on, of those that `show_gpus` left; lets accelerate find the
        other ranks.

        `wanted` is "cpu", "cuda:N" for the first rank's, or None for a GPU where there is one.
        Raises ValueError for a device that there is not.
        """
        import torch

        device = f"cuda:{self.index}" if has_gpu(wanted) else "cpu"
        if device == "cpu" and wanted not in (None, "cpu"):
            raise ValueError(f"the device {wanted!r} is not here: torch sees no such GPU")
        if self.num_ranks > 1:
            values = (self.index, self.index, self.num_ranks, self.num_ranks, HOST, self.port)
            os.environ.update(zip(VARIABLES, map(str, values), strict=True))
        if self.num_ranks > 1 and device == "cpu":  # the ranks share the cores
            torch.set_num_threads(max(1, torch.get_num_threads() // self.num_ranks))
        return device

    def leave(self) -> None:
        """Ends what `join` began, so that evaluation runs in one process and knows of no other."""
        if self.num_ranks == 1:
            return
        import torch.distributed as dist
        from accelerate.state import AcceleratorState

        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        for name in VARIABLES:
            os.environ.pop(name, None)


def ranks(num_ranks: int) -> list[Rank]:
    """`num_ranks` ranks that meet at a port that is free now."""
    if num_ranks == 1:
        return [Rank()]
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    return [Rank(index, num_ranks, port) for index in range(num_ranks)]


def check_device(wanted: str | None, num_ranks: int) -> None:
    """Raises ValueError unless every rank has a GPU of its own, where GPUs are to be used."""
    import torch

    num_gpus, first = torch.cuda.device_count(), first_gpu(wanted)
    if wanted not in (None, "cpu") and first >= num_gpus:
        seen = f"GPUs 0 to {num_gpus - 1}" if num_gpus else "no GPU"
        raise ValueError(f"--device: {wanted!r} is not here, torch sees {seen}; cpu is allowed too")
    if wanted != "cpu" and 0 < num_gpus < first + num_ranks:
        after = f" from {wanted} on" if first else ""
        raise ValueError(f"--processes: {num_ranks} need a GPU each{after}, torch sees {num_gpus}")


def first_gpu(wanted: str | None) -> int:
    """The GPU of the first rank where `wanted` is "cuda:N", or None for what there is."""
    return int((wanted or "").partition(":")[2] or 0)


def has_gpu(wanted: str | None) -> bool:
    """Whether cells that want the device `wanted` (None: what there is) train on a GPU."""
    import torch

    return wanted != "cpu" and torch.cuda.is_available()


def share(batch_size: int, accumulation: int, num_ranks: int) -> tuple[int, int]:
    """Batch size and accumulation steps of each rank, so that the global batch stays the same.

    Raises ValueError if neither is a multiple of `num_ranks`.
    """
    if batch_size % num_ranks == 0:
        return batch_size // num_ranks, accumulation
    if accumulation % num_ranks == 0:
        return batch_size, accumulation // num_ranks
    raise ValueError(
        f"--processes: {num_ranks} cannot share a batch of {batch_size} that is accumulated "
        f"{accumulation} times; allowed: a divisor of one of the two"
    )
