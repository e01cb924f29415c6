"""A step of `spiel.optim.SpielAdamW` in one pass over memory, for flat tensors on a GPU.

Needs triton, as `spiel.ops.triton_kernels` does.
"""

import torch
import triton
import triton.language as tl

from spiel.ops.triton_kernels import check_devices

_BLOCK = 1024


@triton.jit
def _adamw_kernel(  # type: ignore[no-untyped-def]
    value_ptr,  # [k]
    gradient_ptr,  # [k]
    exp_avg_ptr,  # [k]
    exp_avg_sq_ptr,  # [k]
    age_ptr,  # [k], int16; not read if SAME_AGE
    corrections_ptr,  # [max_age + 1]; not read if SAME_AGE
    correction,  # read if SAME_AGE
    k,
    max_age,
    lr,
    beta1_rest,  # 1 - beta1
    beta2,
    beta2_rest,
    eps,
    decay,  # 1 - lr * weight_decay
    SAME_AGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < k
    gradient = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + at, mask=inside, other=0.0).to(tl.float32)
    v = tl.load(exp_avg_sq_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + at, mask=inside, other=0.0).to(tl.float32)
    m += beta1_rest * (gradient - m)
    v = v * beta2 + beta2_rest * gradient * gradient
    step = m / (tl.sqrt_rn(v) + eps)
    if SAME_AGE:
        step *= correction
    else:
        age = tl.load(age_ptr + at, mask=inside, other=1).to(tl.int32)
        step *= tl.load(corrections_ptr + age)
        tl.store(age_ptr + at, tl.minimum(age + 1, max_age).to(tl.int16), mask=inside)
    value = (value - lr * step) * decay
    tl.store(value_ptr + at, value.to(value_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_ptr + at, m.to(exp_avg_ptr.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq_ptr + at, v.to(exp_avg_sq_ptr.dtype.element_ty), mask=inside)


def adamw_step(
    value: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    age: torch.Tensor,
    corrections: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Changes values, moments and ages in place; arithmetic is fp32. Formula: `SpielAdamW`.

    Args:
        value: [k] deltas, contiguous, as all tensors are.
        gradient: [k].
        exp_avg: [k] first moments, fp32 or bf16 (rounded once a step).
        exp_avg_sq: [k] second moments, likewise.
        age: int16, counted up to where `corrections` ends: [k], or [] on the CPU for all alike.
        corrections: fp32 [highest age + 1], the bias correction at each age, on `age`'s device.

    Raises:
        ValueError: a tensor is not contiguous or not of the size of `value`.
        RuntimeError: tensors are not on one GPU, and this is not triton's interpreter.
    """
    is_same_age = age.dim() == 0
    flat = [value, gradient, exp_avg, exp_avg_sq]
    flat += [] if is_same_age else [age]
    check_devices(*flat, *([] if is_same_age else [corrections]))
    if not all(tensor.is_contiguous() and tensor.shape == value.shape for tensor in flat):
        raise ValueError(f"all must be contiguous and alike, got {[list(t.shape) for t in flat]}")
    k, max_age = value.numel(), len(corrections) - 1
    if k > 0:
        numbers = (lr, 1 - betas[0], betas[1], 1 - betas[1], eps, 1 - lr * weight_decay)
        same = float(corrections[int(age)]) if is_same_age else 0.0
        own = (value, value) if is_same_age else (age, corrections)
        with torch.cuda.device_of(value):
            _adamw_kernel[(triton.cdiv(k, _BLOCK),)](
                *(tensor.detach() for tensor in (*flat[:4], *own)),
                *(same, k, max_age),
                *map(float, numbers),
                *(is_same_age, _BLOCK),
            )
    if is_same_age:
        age.clamp_(max=max_age - 1).add_(1)
