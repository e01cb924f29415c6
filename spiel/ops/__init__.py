"""The gradient of a weight at k entries, by the backend that suits device, density and size.

The choice is a rule that can be read here, can be overruled (`use_backend`), and is counted
(`backend_calls`), so that a record can name what ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from spiel.ops import blocked, crossover, reference, sampled
from spiel.ops.transposed import forget_operands as forget_operands

SampledGradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _on_triton(
    left_TR: torch.Tensor, right_TC: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """`spiel.ops.triton_kernels.sampled_gradient`, imported only where it is wanted."""
    from spiel.ops import triton_kernels

    return triton_kernels.sampled_gradient(left_TR, right_TC, indices)


BACKENDS: dict[str, SampledGradient] = {
    "reference": reference.sampled_gradient,
    "sampled": sampled.sampled_gradient,
    "blocked": blocked.sampled_gradient,
    "triton": _on_triton,
}

#: Above this density one dense product is cheaper on a CPU than a dot product for each entry.
CPU_SAMPLED_MAX_DENSITY = 0.06
#: Below this many entries a weight is so small that a call's fixed cost decides.
CPU_SAMPLED_MIN_NUMEL = 2**16

#: How often each backend ran in this process.
backend_calls: Counter[str] = Counter()

_forced: str | None = None


def choose_backend(
    device: torch.device, k: int, numel: int, dtype: torch.dtype = torch.float32
) -> str:
    """The name of the backend for a weight of `numel` entries of which `k` are wanted.

    `dtype` is that of the operands, which matters on a GPU: see `spiel.ops.crossover`.
    """
    if _forced is not None:
        return _forced
    if device.type == "cuda":
        return crossover.faster_backend(device, dtype, k / numel)
    if device.type != "cpu" or numel < CPU_SAMPLED_MIN_NUMEL:
        return "blocked"
    return "sampled" if k <= CPU_SAMPLED_MAX_DENSITY * numel else "blocked"


def sampled_gradient(
    left_TR: torch.Tensor, right_TC: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """The entries `indices` [k] of left.T @ right, in fp32.

    `left_TR` [tokens, rows] and `right_TC` [tokens, cols] may be of any float dtype and layout.
    """
    if len(indices) == 0:
        return torch.zeros(0, dtype=torch.float32, device=left_TR.device)
    numel = left_TR.shape[1] * right_TC.shape[1]
    name = choose_backend(left_TR.device, len(indices), numel, left_TR.dtype)
    backend_calls[name] += 1
    return BACKENDS[name](left_TR, right_TC, indices)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, runs every op by the backend `name` (None: back to the rule).

    Raises:
        ValueError: there is no such backend.
    """
    global _forced
    if name is not None and name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, must be one of {', '.join(sorted(BACKENDS))}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
