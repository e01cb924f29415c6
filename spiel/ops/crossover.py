"""On a GPU, up to which density of wanted entries the sampled kernel beats the dense product.

Measured once for each GPU, dtype and version of torch, triton and this code, on one standard shape,
and kept in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch

from spiel.ops import blocked
from spiel.ops.reference import SampledGradients
from spiel.ops.timing import cuda_seconds
from spiel.ops.transposed import forget_operands

#: Seconds that a call takes.
Timer = Callable[[Callable[[], object]], float]

#: Tokens, rows and columns. Both products grow alike with all three, as long as the GPU is full.
STANDARD_SHAPE = (2048, 4096, 4096)
DENSITIES = (0.001, 0.0025, 0.0065, 0.018, 0.05)
#: Where nothing could be measured yet: traffic and arithmetic of an H200, counted on paper.
UNMEASURED_DENSITY = 0.008

#: What this process knows: key of a machine and dtype -> density.
_known: dict[str, float] = {}
_runs: dict[torch.device, bool] = {}


def faster_backend(device: torch.device, dtype: torch.dtype, density: float) -> str:
    """The backend for a weight of this density on a GPU, for operands of `dtype`."""
    if not kernels_run(device):
        return "blocked"
    return "triton" if density <= crossover_density(device, dtype) else "blocked"


@cache
def has_triton() -> bool:
    """Whether triton is installed; answers without importing it."""
    return find_spec("triton") is not None


def kernels_run(device: torch.device) -> bool:
    """Whether Triton's kernels can be compiled and run on this GPU; tried once, on four entries."""
    if device not in _runs:
        if torch.cuda.is_current_stream_capturing():
            return False  # a graph would record the try
        _runs[device] = has_triton() and _try_kernels(device)
    return _runs[device]


def _try_kernels(device: torch.device) -> bool:
    try:
        from spiel.ops import triton_kernels

        weight, indices = torch.zeros(2, 3, device=device), torch.arange(4, device=device).int()
        values = torch.ones(4, device=device)
        triton_kernels.write_entries(weight, indices, values, values)
        return weight.flatten().tolist() == [2, 2, 2, 2, 0, 0]
    except Exception as error:  # no compiler, a GPU too old: there are many, and one way to go on
        warnings.warn(
            "SpIEL's Triton kernels do not run here, so torch's own operations are used: "
            f"{type(error).__name__}: {error}",
            stacklevel=2,
        )
        return False


def crossover_density(device: torch.device, dtype: torch.dtype) -> float:
    """The density at which both take the same time: known, read from the file, or measured now.

    The first call for a GPU and dtype may take seconds and about 150 MB of its memory.
    """
    key = machine_key(device, dtype)
    if key not in _known:
        density = _load().get(key)
        if density is None and torch.cuda.is_current_stream_capturing():
            return UNMEASURED_DENSITY  # a graph would record the measurement
        _known[key] = _measured_and_saved(device, dtype, key) if density is None else density
    return _known[key]


@cache
def machine_key(device: torch.device, dtype: torch.dtype) -> str:
    """What the crossover depends on, as text."""
    import triton

    name, dtype_name = torch.cuda.get_device_name(device), str(dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}, triton {triton.__version__}, code {_code()}"
    return f"{name}, {dtype_name}, {versions}"


def _code() -> str:
    """Eight digits that change with the code of the two that are compared."""
    folder = Path(__file__).parent
    sources = [(folder / name).read_bytes() for name in ("triton_kernels.py", "blocked.py")]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:8]


def _measured_and_saved(device: torch.device, dtype: torch.dtype, key: str) -> float:
    try:
        with torch.cuda.device(device):
            density = measure(_sampled_and_copies, blocked.sampled_gradients, cuda_seconds, dtype)
    except Exception as error:  # no compiler, no memory: there are many, and one way to go on
        warnings.warn(
            f"SpIEL's sampled kernel could not be measured on {key}, so that this process forms "
            f"gradients by the blocked dense product: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return 0.0
    _save(key, density)
    return density


def _sampled_and_copies(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """The sampled kernel with the copies it needs, which some modules share: an upper bound."""
    from spiel.ops import triton_kernels

    forget_operands()
    try:
        return triton_kernels.sampled_gradients(left_TR, right_TC, supports)
    finally:
        forget_operands()


@torch.no_grad()
def measure(
    sampled: SampledGradients,
    dense: SampledGradients,
    timer: Timer,
    dtype: torch.dtype,
    shape: tuple[int, int, int] = STANDARD_SHAPE,
    device: str = "cuda",
) -> float:
    """The density at which `sampled` and `dense` take the same time by `timer`.

    Leaves torch's random number generators as they are.
    """
    tokens, rows, cols = shape
    generator = torch.Generator(device).manual_seed(0)
    left = torch.randn(tokens, rows, dtype=dtype, device=device, generator=generator)
    right = torch.randn(tokens, cols, dtype=dtype, device=device, generator=generator)
    seconds = []
    for density in DENSITIES:
        indices = _scattered(max(1, round(density * rows * cols)), rows * cols, generator)
        seconds.append([timer(partial(op, left, right, [indices])) for op in (sampled, dense)])
    return crossing(DENSITIES, *zip(*seconds, strict=True))


def _scattered(k: int, numel: int, generator: torch.Generator) -> torch.Tensor:
    """A support of `k` of `numel` entries: one at random in each of k equal stretches."""
    stretch = numel // k
    starts = torch.arange(k, dtype=torch.int32, device=generator.device) * stretch
    return starts + torch.randint(
        stretch, (k,), dtype=torch.int32, device=generator.device, generator=generator
    )


def crossing(
    densities: Sequence[float], sampled_seconds: Sequence[float], dense_seconds: Sequence[float]
) -> float:
    """Where the sampled times, growing with density, first reach the dense ones.

    Interpolated between the neighbours in the logarithms of density and of the ratio of times. 0
    if the dense product is always faster; the highest density if it never is: nobody looked beyond.
    """
    ratios = [math.log(s / d) for s, d in zip(sampled_seconds, dense_seconds, strict=True)]
    above = next((i for i, ratio in enumerate(ratios) if ratio >= 0), None)
    if above is None:
        return densities[-1]
    if above == 0:
        return 0.0
    low, high = math.log(densities[above - 1]), math.log(densities[above])
    share = ratios[above - 1] / (ratios[above - 1] - ratios[above])
    return math.exp(low + share * (high - low))


def cache_file() -> Path:
    """Where crossovers are kept for later processes.

    Raises:
        RuntimeError: the user has no home folder.
    """
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "spiel" / "crossover.json"


def _load() -> dict[str, float]:
    """What the file holds; nothing if it is missing, damaged or unreadable."""
    try:
        found = json.loads(cache_file().read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {key: float(value) for key, value in items if _is_density(value)}


def _is_density(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _save(key: str, density: float) -> None:
    """Adds to the file, whole or not at all; what cannot be kept is measured again next time."""
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            text = json.dumps({**_load(), key: density}, indent=1, sort_keys=True)
            written.write_text(text, encoding="utf-8")
            written.replace(path)
    except (OSError, RuntimeError):
        return
