"""Products in their operands' own dtype, whatever the caller's backward runs under."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


def without_autocast(function: _Function) -> _Function:
    """`function`, whose first argument is a tensor, under no autocast: one around the caller's
    backward would turn fp32 sums into bf16 ones.
    """

    @wraps(function)
    def call(left: torch.Tensor, *args: Any) -> Any:
        kind = left.device.type
        if not torch.is_autocast_enabled(kind):  # making a context takes longer than asking
            return function(left, *args)
        with torch.autocast(kind, enabled=False):
            return function(left, *args)

    return call  # type: ignore[return-value]
