"""The gradient of a weight at k entries, by the backend that suits device, density and size.

The choice is a rule that can be read here, can be overruled (`use_backend`), and is counted
(`backend_calls`), so that a record can name what ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from spiel.ops import blocked, crossover, optional, reference, sampled
from spiel.ops.product import Operand, formed
from spiel.ops.reference import SampledGradients
from spiel.ops.transposed import forget_operands
from spiel.support import Seen


def _deferred(name: str) -> SampledGradients:
    """The backend in `spiel.ops.<name>`."""

    def run(
        left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        entries: list[torch.Tensor] = optional.module(name).sampled_gradients(
            left_TR, right_TC, supports
        )
        return entries

    return run


BACKENDS: dict[str, SampledGradients] = {
    "reference": reference.sampled_gradients,
    "sampled": sampled.sampled_gradients,
    "blocked": blocked.sampled_gradients,
    "compiled": _deferred("compiled"),
    "triton": _deferred("triton_kernels"),
}

#: Up to which density a dot product for each entry is cheaper on a CPU than one dense product.
#: Measured: `make bench`, tests/benchmarks/test_ops.py.
CPU_MAX_DENSITY = {"compiled": 0.3, "sampled": 0.1}

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
    if device.type != "cpu" or numel < optional.CPU_MIN_NUMEL:
        return "blocked"
    name = "compiled" if optional.has_numba() else "sampled"
    return name if k <= CPU_MAX_DENSITY[name] * numel else "blocked"


def settle(device: torch.device, dtype: torch.dtype, sizes: Iterable[tuple[int, int]]) -> None:
    """Has what weights of these `sizes` (k, numel) need measured, compiled and tuned now: in the
    first steps its time and memory would count as training's.
    """
    sizes = [(k, numel) for k, numel in sizes if k > 0]
    tokens, rows, cols = crossover.STANDARD_SHAPE if device.type == "cuda" else (16, 16, 16)
    indices = torch.arange(0, rows * cols, cols // 10, dtype=torch.int32, device=device)
    for name in sorted({choose_backend(device, k, numel, dtype) for k, numel in sizes}):
        left, right = (torch.zeros(tokens, n, dtype=dtype, device=device) for n in (rows, cols))
        BACKENDS[name](left, right, [indices])
    forget()
    if any(numel >= optional.CPU_MIN_NUMEL for _, numel in sizes):
        values = torch.zeros(2, device=device)
        weight = torch.zeros(optional.CPU_MIN_NUMEL // 16, 16, dtype=dtype, device=device)
        write_entries(weight, indices[:2], values.to(dtype), values)
        if device.type == "cpu" and optional.has_numba():
            optional.module("scans").settle()


def forget() -> None:
    """Lets go of what is kept for the next call; for the end of a backward pass."""
    forget_operands()
    blocked.forget_block()


class SupportGradients:
    """The gradient of a weight at some supports, each [k], in backward pass after backward pass.

    Between large products whatever has to be looked up is far from the cache, so what follows from
    the supports alone is looked up once: the backend, and how that divides its work. So this holds
    as long as nobody writes into them: see `renewed`.
    """

    def __init__(self, *supports: torch.Tensor) -> None:
        self._supports, self._seen = supports, Seen(supports)
        self._k = sum(map(len, supports))
        self._asked: tuple[str | None, torch.dtype] | None = None

    @classmethod
    def renewed(cls, kept: SupportGradients | None, *supports: torch.Tensor) -> SupportGradients:
        """`kept`, if it is of these supports and none was written into since; else a new one."""
        return kept if kept is not None and kept._seen.is_of(supports) else cls(*supports)

    def __call__(self, left_TR: torch.Tensor, right_TC: Operand) -> list[torch.Tensor]:
        """For each support those entries of left.T @ right, in fp32.

        `left_TR` [tokens, rows] and `right_TC` [tokens, cols] may be of any float dtype and layout,
        and `right_TC` a product, which is formed where the backend does not take it as it is.
        """
        if self._k == 0:
            return [
                torch.zeros(0, dtype=torch.float32, device=left_TR.device) for _ in self._supports
            ]
        if self._asked != (_forced, left_TR.dtype):
            self._look_up(left_TR, right_TC)
        backend_calls[self._backend] += 1
        return self._run(left_TR, right_TC)

    def _look_up(self, left_TR: torch.Tensor, right_TC: Operand) -> None:
        supports, numel = self._supports, left_TR.shape[1] * right_TC.shape[1]
        name = choose_backend(left_TR.device, self._k, numel, left_TR.dtype)
        self._run: Callable[[torch.Tensor, Operand], list[torch.Tensor]]
        if name == "compiled":
            self._run = optional.module(name).SampledEntries(*supports)
        else:
            self._run = lambda left, right: BACKENDS[name](left, formed(right), supports)
        self._asked, self._backend = (_forced, left_TR.dtype), name


def sampled_gradient(
    left_TR: torch.Tensor, right_TC: Operand, indices: torch.Tensor
) -> torch.Tensor:
    """The entries of one support [k], as `SupportGradients` gives them, once."""
    return SupportGradients(indices)(left_TR, right_TC)[0]


def write_entries(
    weight: torch.Tensor, indices: torch.Tensor, originals: torch.Tensor, deltas: torch.Tensor
) -> bool:
    """weight[indices] = round(originals + deltas) in one pass, if there is a kernel for these.

    `weight` is [rows, cols], the others [k]. Returns whether it was done: what torch's own
    operations give is the same to the bit, so nobody need know which of them ran.
    """
    tensors = (weight, originals, deltas)
    if weight.is_cuda and crossover.kernels_run(weight.device):
        optional.module("triton_kernels").write_entries(weight, indices, originals, deltas)
        return True
    is_fp32 = all(tensor.dtype == torch.float32 for tensor in tensors)
    is_suited = is_fp32 and weight.is_contiguous()
    if is_suited and optional.is_for_numba(weight.device, weight.numel()):
        optional.module("scans").write_entries(weight, indices, originals, deltas)
        return True
    return False


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the context, gradients are formed by the backend `name` (None: back to the rule).

    The micro-batch that chooses growth candidates has a dense product all the same.

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
