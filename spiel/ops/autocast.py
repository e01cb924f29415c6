"""Products in their operands' own dtype, whatever the caller's backward runs under."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch

_Others = ParamSpec("_Others")
_Result = TypeVar("_Result")


def without_autocast(
    function: Callable[Concatenate[torch.Tensor, _Others], _Result],
) -> Callable[Concatenate[torch.Tensor, _Others], _Result]:
    """`function`, whose first argument is a tensor, under no autocast: one around the caller's
    backward would turn fp32 sums into bf16 ones.
    """

    @wraps(function)
    def call(left: torch.Tensor, *args: _Others.args, **kwargs: _Others.kwargs) -> _Result:
        kind = left.device.type
        if not torch.is_autocast_enabled(kind):  # making a context takes longer than asking
            return function(left, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return function(left, *args, **kwargs)

    return call
