"""What is imported only where it is there and wanted: the kernels of numba and Triton."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

#: Below this many entries a weight is so small that a call's fixed cost decides, and models of
#: such weights are spared numba's 60 MB of compiler.
CPU_MIN_NUMEL = 2**16

#: Of fewer entries torch's operations cost little more.
CPU_MIN_ENTRIES = 2**11


@cache
def module(name: str) -> ModuleType:
    """`spiel.ops.<name>`, imported when it is first wanted."""
    return import_module(f"spiel.ops.{name}")


@cache
def has_numba() -> bool:
    """Whether numba's kernels can be used; says why not where numba is there but fails."""
    if find_spec("numba") is None:
        return False
    try:
        import_module("spiel.ops.compiled")
    except Exception as error:  # as with a numpy that is too new for it
        warnings.warn(
            "numba cannot be used, so SpIEL forms gradients on CPUs by torch's sampled product: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False
    return True


def is_for_numba(device: torch.device, numel: int) -> bool:
    """Whether numba's kernels work on a weight of `numel` entries on `device`."""
    return device.type == "cpu" and numel >= CPU_MIN_NUMEL and has_numba()


def are_for_numba(device: torch.device, k: int) -> bool:
    """Whether numba's walks along `k` entries on `device` are worth a call, where some large weight
    had them loaded.
    """
    is_worth_it = device.type == "cpu" and k >= CPU_MIN_ENTRIES
    return is_worth_it and "spiel.ops.scans" in sys.modules and has_numba()
