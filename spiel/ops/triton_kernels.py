"""Only the wanted entries of a weight, by kernels of our own: their gradient, and their writing.

See `spiel.ops.reference` for what `sampled_gradients` computes. Needs triton, and CUDA tensors or
triton's interpreter (TRITON_INTERPRET=1 before triton is imported), which takes CPU tensors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from spiel.ops.timing import cuda_seconds
from spiel.ops.transposed import last_left, last_right

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "the backend 'triton' needs triton, which CUDA builds of torch bring along: "
        "install it, or choose another backend with spiel.ops.use_backend"
    ) from error

#: Operands are padded to this many tokens, so that their rows can be read 16 bytes at a time.
TOKEN_MULTIPLE = 16


@triton.jit
def _transpose_kernel(  # type: ignore[no-untyped-def]
    operand_ptr, copy_ptr, tokens, num, padded, stride_token, stride_num, BLOCK: tl.constexpr
):
    """copy[n, t] = operand[t, n] for t < tokens, 0 for tokens <= t < padded."""
    token_B1 = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[:, None]
    n_1B = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    source = operand_ptr + token_B1 * stride_token + n_1B * stride_num
    tile = tl.load(source, mask=(token_B1 < tokens) & (n_1B < num), other=0.0)
    target = copy_ptr + n_1B * padded + token_B1
    tl.store(target, tile, mask=(token_B1 < padded) & (n_1B < num))


@triton.jit(do_not_specialize=["k"])  # one program for layers with any number of entries
def _sampled_kernel(  # type: ignore[no-untyped-def]
    left_ptr,  # [rows, tokens]
    right_ptr,  # [cols, tokens]
    indices_ptr,  # [k]
    values_ptr,  # [k]
    k,
    cols,
    tokens,
    BLOCK_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """values[e] = left[row of e] . right[column of e], for BLOCK_E consecutive entries.

    Consecutive entries are mostly of one row, which then comes from the first-level cache.
    """
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    index = tl.load(indices_ptr + entry, mask=entry < k, other=0)
    row = index // cols
    col = index - row * cols
    left_E1 = (left_ptr + row.to(tl.int64) * tokens)[:, None]
    right_E1 = (right_ptr + col.to(tl.int64) * tokens)[:, None]
    sums_ET = tl.zeros((BLOCK_E, BLOCK_T), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        token_1T = (start + tl.arange(0, BLOCK_T))[None, :]
        left_ET = tl.load(left_E1 + token_1T, mask=token_1T < tokens, other=0.0)
        right_ET = tl.load(right_E1 + token_1T, mask=token_1T < tokens, other=0.0)
        sums_ET = tl.fma(left_ET.to(tl.float32), right_ET.to(tl.float32), sums_ET)
    tl.store(values_ptr + entry, tl.sum(sums_ET, axis=1), mask=entry < k)


@triton.jit(do_not_specialize=["k"])
def _write_kernel(  # type: ignore[no-untyped-def]
    weight_ptr,  # [rows, cols], strided
    indices_ptr,  # [k]
    originals_ptr,  # [k]
    deltas_ptr,  # [k]
    k,
    cols,
    stride_row,
    stride_col,
    SUM_DTYPE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """weight[index of e] = originals[e] + deltas[e], rounded once."""
    entry = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = entry < k
    index = tl.load(indices_ptr + entry, mask=inside, other=0)
    row = index // cols
    col = index - row * cols
    place = weight_ptr + row.to(tl.int64) * stride_row + col.to(tl.int64) * stride_col
    before = tl.load(originals_ptr + entry, mask=inside, other=0.0).to(SUM_DTYPE)
    sums = before + tl.load(deltas_ptr + entry, mask=inside, other=0.0).to(SUM_DTYPE)
    if weight_ptr.dtype.element_ty != tl.float64:
        sums = sums.to(tl.float32)  # on the way to 16 bits, as torch does from 64
    tl.store(place, sums.to(weight_ptr.dtype.element_ty), mask=inside)


#: Whether kernels run in triton's interpreter in this process.
INTERPRETED = not isinstance(_sampled_kernel, triton.JITFunction)

#: Without tuning. The interpreter's cost is per program: there, a few large ones.
_FIXED_BLOCKS = {"BLOCK_E": 128, "BLOCK_T": 128} if INTERPRETED else {"BLOCK_E": 8, "BLOCK_T": 256}
_WRITE_BLOCK = 1024

_CONFIGS = ((4, 512, 4), (8, 256, 4), (8, 512, 8), (16, 256, 8), (32, 128, 8))


def _times(run: Callable[[], object], quantiles: tuple[float, ...]) -> list[float]:
    """The tuner's clock. Triton's own would take 256 MB to clear the cache, which in training
    still holds the operands just copied.
    """
    return [cuda_seconds(run)] * len(quantiles)


_tuned_sampled_kernel: Any = _sampled_kernel
if not INTERPRETED:
    _tuned_sampled_kernel = triton.autotune(
        [
            triton.Config({"BLOCK_E": block_e, "BLOCK_T": block_t}, num_warps=num_warps)
            for block_e, block_t, num_warps in _CONFIGS
        ],
        key=[],  # once for each combination of dtypes: not again in the midst of training
        do_bench=_times,
    )(_sampled_kernel)


def sampled_gradients(
    left_TR: torch.Tensor, right_TC: torch.Tensor, supports: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """For each support [k] those entries of left.T @ right, in fp32.

    Sums are fp32, without atomics. Their order depends on which block sizes were fastest in this
    process, unless `torch.use_deterministic_algorithms` is on: then these are fixed.

    Raises:
        RuntimeError: tensors are not on one GPU, and this is not triton's interpreter.
    """
    _check_devices(left_TR, right_TC, *supports)
    if len(left_TR) == 0:
        return [
            torch.zeros(len(indices), dtype=torch.float32, device=left_TR.device)
            for indices in supports
        ]
    left_RT = last_left(left_TR, left_TR.dtype, padded_transpose)
    right_CT = last_right(right_TC, right_TC.dtype, padded_transpose)
    return [_products(left_RT, right_CT, indices.contiguous()) for indices in supports]


def _products(left_RT: torch.Tensor, right_CT: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """The entries `indices` [k] of left @ right.T, in fp32."""
    k, tokens = len(indices), left_RT.shape[1]
    values = torch.empty(k, dtype=torch.float32, device=left_RT.device)
    if k == 0:
        return values
    sizes = (k, len(right_CT), tokens)
    is_fixed = INTERPRETED or torch.are_deterministic_algorithms_enabled()
    kernel = _sampled_kernel if is_fixed else _tuned_sampled_kernel
    blocks = _FIXED_BLOCKS if is_fixed else {}
    with torch.cuda.device_of(values):
        kernel[lambda meta: (triton.cdiv(k, meta["BLOCK_E"]),)](
            left_RT, right_CT, indices, values, *sizes, **blocks
        )
    return values


def padded_transpose(operand_TN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The copy [N, T], contiguous, in `dtype`, with zeros up to a T of whole TOKEN_MULTIPLEs."""
    tokens, num = operand_TN.shape
    padded = triton.cdiv(tokens, TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    copy_NT = torch.empty(num, padded, dtype=dtype, device=operand_TN.device)
    block = 64
    with torch.cuda.device_of(copy_NT):
        _transpose_kernel[triton.cdiv(padded, block), triton.cdiv(num, block)](
            operand_TN.detach(), copy_NT, tokens, num, padded, *operand_TN.stride(), block
        )
    return copy_NT


def write_entries(
    weight: torch.Tensor, indices: torch.Tensor, originals: torch.Tensor, deltas: torch.Tensor
) -> None:
    """weight[indices] = round(originals + deltas), in one launch.

    The sum is fp32 (fp64 if one of them is) and rounded once, to nearest even, as torch does it.

    Args:
        weight: [rows, cols]; any strides. Autograd does not see it change.
        indices: [k], flat and unique.
        originals: [k], of any float dtype.
        deltas: [k], of any float dtype.

    Raises:
        RuntimeError: tensors are not on one GPU, and this is not triton's interpreter.
    """
    _check_devices(weight, indices, originals, deltas)
    k = len(indices)
    if k == 0:
        return
    tensors = (weight, indices.contiguous(), originals.contiguous(), deltas.contiguous())
    sizes = (k, weight.shape[1], *weight.stride())
    is_wide = torch.float64 in (weight.dtype, originals.dtype, deltas.dtype)
    sum_dtype = tl.float64 if is_wide else tl.float32
    with torch.cuda.device_of(weight):
        _write_kernel[(triton.cdiv(k, _WRITE_BLOCK),)](
            *(tensor.detach() for tensor in tensors), *sizes, sum_dtype, _WRITE_BLOCK
        )


def _check_devices(*tensors: torch.Tensor) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or not (INTERPRETED or tensors[0].is_cuda):
        found = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(
            f"the backend 'triton' takes tensors on one CUDA device, got some on {found}; on a CPU "
            "it runs in triton's interpreter only (TRITON_INTERPRET=1 before triton is imported)"
        )
