"""How optimiser state is kept: fp32, bf16, or 8 bits in blocks with one scale each."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

STATE_DTYPES = ("float32", "bfloat16", "8bit")

#: Entries that share a scale in 8-bit state.
BLOCK = 256


def check_state_dtype(name: str) -> None:
    """Raises ValueError if it is none of STATE_DTYPES, ImportError if it is "8bit" and bitsandbytes
    is not installed.
    """
    if name not in STATE_DTYPES:
        raise ValueError(f"state_dtype {name!r} must be one of {', '.join(STATE_DTYPES)}")
    if name == "8bit":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            message = "state_dtype '8bit' needs bitsandbytes: pip install bitsandbytes"
            raise ImportError(message) from error


def fetch(state: dict[str, Any], name: str, dtype: str) -> torch.Tensor:
    """The moment `name` [k] as fp32; the stored tensor itself where that is fp32."""
    if dtype != "8bit":
        stored: torch.Tensor = state[name]
        return stored.float()
    from bitsandbytes.functional import dequantize_blockwise

    code = _code(name, state[name].device)
    return dequantize_blockwise(
        state[name], absmax=state[f"{name}_absmax"], code=code, blocksize=BLOCK
    )


def store(state: dict[str, Any], name: str, value: torch.Tensor, dtype: str) -> None:
    """Keeps the fp32 moment `value` [k] under `name`."""
    if dtype != "8bit":
        state[name] = value.to(getattr(torch, dtype))
        return
    from bitsandbytes.functional import quantize_blockwise

    quantized, how = quantize_blockwise(value, code=_code(name, value.device), blocksize=BLOCK)
    state[name], state[f"{name}_absmax"] = quantized, how.absmax


@cache
def _code(name: str, device: torch.device) -> torch.Tensor:
    """The 256 values an 8-bit entry can take: with a sign for the first moment only."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=name == "exp_avg").to(device)
