"""A step of SpielAdamW: by torch's operations on many tensors, or by numba's kernel for CPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from spiel.ops import optional

#: Ages saturate here: they fit 2 bytes, and by then bias correction is 1 in fp32 for b2 <= 0.999.
MAX_AGE = 2**15 - 1

_Tensors = list[torch.Tensor]


def is_for_one_pass(parameter: torch.Tensor) -> bool:
    """Whether numba's kernel takes the step of `parameter`."""
    is_suited = parameter.dtype == torch.float32 and parameter.is_contiguous()
    return is_suited and optional.are_for_numba(parameter.device, parameter.numel())


def advance(
    parameters: _Tensors,
    gradients: _Tensors,
    m: _Tensors,
    v: _Tensors,
    ages: _Tensors,
    group: dict[str, Any],
) -> None:
    """Changes `parameters`, `m` and `v` in place, by the formula of `spiel.SpielAdamW`.

    Args:
        parameters: of one device and dtype, all or none of them `is_for_one_pass`.
        gradients: in fp32 and of the parameters' shapes, as are `m` and `v`.
        ages: int16, up to MAX_AGE: one for each entry [k], or for all of a parameter, on the CPU.
        group: lr, betas, eps and weight_decay.
    """
    (beta1, beta2), eps, lr = group["betas"], group["eps"], group["lr"]
    if is_for_one_pass(parameters[0]):
        table, decay = _table(beta1, beta2, torch.device("cpu")), group["weight_decay"]
        by_numba = optional.module("scans").adamw
        by_numba(parameters, gradients, m, v, ages, table, (beta1, beta2), eps, lr, decay)
        return
    # Each line is one call for all of them.
    torch._foreach_lerp_(m, gradients, 1 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, gradients, gradients, 1 - beta2)
    step = torch._foreach_sqrt(v)
    torch._foreach_add_(step, eps)
    torch._foreach_reciprocal_(step)
    torch._foreach_mul_(step, m)
    _correct_bias(step, ages, beta1, beta2)
    torch._foreach_add_(parameters, step, alpha=-lr)
    if group["weight_decay"]:
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])


@lru_cache(maxsize=8)  # schedules that cycle beta1 ask for another one in every step
def _table(beta1: float, beta2: float, device: torch.device) -> torch.Tensor:
    """sqrt(1 - b2^age) / (1 - b1^age) for each age, in fp32."""
    ages = torch.arange(MAX_AGE + 1, dtype=torch.float64, device="cpu")
    return ((1 - beta2**ages).sqrt() / (1 - beta1**ages)).float().to(device)


def _correct_bias(
    steps: Sequence[torch.Tensor], ages: _Tensors, beta1: float, beta2: float
) -> None:
    """Multiplies each step by what its age asks: one for the whole tensor, or for each entry."""
    whole = [i for i, age in enumerate(ages) if age.dim() == 0]
    if whole:  # these ages are on the CPU: no transfer for a number
        table = _table(beta1, beta2, torch.device("cpu"))
        factors = [float(table[int(ages[i])]) for i in whole]
        torch._foreach_mul_([steps[i] for i in whole], factors)
    single = [i for i, age in enumerate(ages) if age.dim() > 0]
    if single:
        table = _table(beta1, beta2, steps[0].device)
        factor = table[torch.cat([ages[i] for i in single]).int()]
        own = factor.split([len(ages[i]) for i in single])
        torch._foreach_mul_([steps[i] for i in single], own)
