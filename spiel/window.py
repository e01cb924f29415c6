"""GradientWindow: what AG gathers of one weight's gradient between two reselections."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spiel.distributed import average_, on_any_rank
from spiel.ops import SupportGradients, sampled_gradient
from spiel.ops.blocked import BlockEntries, largest_gradients
from spiel.ops.product import Operand, formed

#: A scale that is off by less is rounding.
SCALE_TOLERANCE = 1e-5

#: About so many entries of each active gradient tell the scale; never twice as many.
SAMPLE_SIZE = 64


class GradientWindow:
    """The gradients of a weight's growth candidates over a few optimizer steps.

    The first micro-batch of the window in which the weight has a gradient chooses the candidates:
    the k largest |dL/dW| of the whole weight. A gradient that is 0 throughout (all labels masked,
    an expert without tokens) or not finite cannot choose. Of several uses of the weight in one
    backward pass each counts as a micro-batch. From then on, and for that micro-batch too, only the
    candidates' gradients are kept: summed over the micro-batches of an optimizer step, and of these
    step gradients the sum and the sum of squares over steps. Sums are fp32 whatever the model's
    dtype; steps are counted as an integer.

    All of it is averaged over data-parallel ranks: the whole weight's gradient, block by block, on
    the micro-batch that chooses, and the candidates' gradients once in every optimizer step.

    Memory: while open 8 bytes and an index for each candidate, 4 more from backward to step, at
    most half a KiB of the active gradient, and on CPUs one more index for each candidate and each
    active weight.

    Args:
        deltas: the Parameter [k] of the active weights; there are as many candidates.
        may_choose: whether this backward pass may choose the candidates; `spiel.quorum` is one that
            all ranks answer alike. It is asked in every call of `observe`.
    """

    def __init__(
        self,
        deltas: torch.Tensor,
        may_choose: Callable[[GradientWindow], bool] = lambda window: True,
    ) -> None:
        self.deltas = deltas
        self._may_choose = may_choose
        self.num_steps = 0
        self.candidates: torch.Tensor | None = None  # [k] flat indices, sorted
        self.step_gradient: torch.Tensor | None = None  # [k], of the step under way
        self.sample: torch.Tensor | None = None  # of the active weights' gradient, likewise
        self.sums: torch.Tensor | None = None  # [k]
        self.squares: torch.Tensor | None = None  # [k]
        self._gradients: SupportGradients | None = None  # of the active weights and the candidates

    def observe(
        self, left_TR: torch.Tensor, right_TC: Operand, indices: torch.Tensor
    ) -> torch.Tensor:
        """Takes in one micro-batch, whose dL/dW is left.T @ right; returns its entries [k] at the
        support `indices`.
        """
        may_choose = self._may_choose(self)
        if self.candidates is not None:
            supports = indices, self.candidates
            self._gradients = SupportGradients.renewed(self._gradients, *supports)
            active, own = self._gradients(left_TR, right_TC)
            self.step_gradient = own if self.step_gradient is None else self.step_gradient.add_(own)
        elif may_choose:
            active = self._choose(left_TR, right_TC, indices)
        else:
            active = sampled_gradient(left_TR, right_TC, indices)
        part = _sample(active)
        self.sample = part.clone() if self.sample is None else self.sample.add_(part)
        return active

    def _choose(
        self, left_TR: torch.Tensor, right_TC: Operand, indices: torch.Tensor
    ) -> torch.Tensor:
        """As `observe`, by the product that the candidates are chosen from."""
        active = BlockEntries([indices], left_TR.shape[1], right_TC.shape[1])
        right_TC = formed(right_TC)
        chosen, values = largest_gradients(left_TR, right_TC, len(indices), average_, active)
        if 0 < float(values.abs().amax()) < torch.inf:  # NaN is neither
            self.candidates, self.step_gradient = chosen, values
        return active.values[0]

    def step_mean(self) -> torch.Tensor:
        """The gradient [k] of the step under way, averaged over ranks; ends that step."""
        assert self.candidates is not None
        gradient, self.step_gradient = self.step_gradient, None
        if gradient is None:  # only other ranks had one
            gradient = torch.zeros_like(self.candidates, dtype=torch.float32)
        average_(gradient)
        return gradient

    def skip_step(self) -> None:
        """Forgets the step under way, which the optimizer did not take."""
        self.step_gradient = self.sample = None
        if self.num_steps == 0:
            self.candidates = None

    def state_dict(self) -> dict[str, Any]:
        """Between optimizer steps this is all there is to know. Tensors are the window's own, and
        go on changing, as in the state of torch's optimizers.
        """
        return {
            "num_steps": self.num_steps,
            "candidates": self.candidates,
            "sums": self.sums,
            "squares": self.squares,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_steps = state["num_steps"]
        for name in ("candidates", "sums", "squares"):
            value = state[name]
            # A copy: sums go on in place, and the state may be loaded again.
            own = None if value is None else value.to(self.deltas.device, copy=True)
            setattr(self, name, own)


def measure_scale(windows: Sequence[GradientWindow], last: float) -> float:
    """What became of the gradient between backward and the optimizer: that of the active weights,
    as the optimizer is about to see it, over what backward gave.

    Clipping and the loss scaling of fp16 training change all gradients by one factor, so the
    candidates' must change by it too. A few entries of every weight tell it, averaged over ranks
    as the gradients are. Where nothing can be said it is the `last` one. NaN where backward gave
    what is not finite and the optimizer sees what is: a backward pass went by that never reached
    it.
    """
    pairs = [_before_and_after(window) for window in windows]
    if not pairs:
        return last
    device = pairs[0][0].device
    before = torch.cat([part.to(device) for part, _ in pairs])
    after = torch.cat([part.to(device) for _, part in pairs])
    average_(before)
    are_finite = [part.isfinite().all().float() for part in (before, after)]
    products = [before.dot(before), before.dot(after)]
    was_finite, is_finite, norm, product = torch.stack([*are_finite, *products]).tolist()
    if is_finite and not was_finite:
        return math.nan
    scale = product / norm if 0 < norm < math.inf else last
    if not math.isfinite(scale):
        return last
    return 1.0 if abs(scale - 1.0) < SCALE_TOLERANCE else scale


def _before_and_after(window: GradientWindow) -> tuple[torch.Tensor, torch.Tensor]:
    """Entries of the active gradient as backward gave it, and as it is now; 0 where there is none.

    They are of one length on all ranks.
    """
    if window.deltas.grad is None:
        zeros = torch.zeros_like(_sample(window.deltas.detach()), dtype=torch.float32)
        return zeros, zeros
    after = _sample(window.deltas.grad).float()
    return torch.zeros_like(after) if window.sample is None else window.sample, after


def end_step(windows: Sequence[GradientWindow], scale: float = 1.0) -> None:
    """Closes an optimizer step, whose gradient the optimizer saw times `scale`.

    A weight's gradient that is not finite is no step: it may be of a backward pass that never
    reached the optimizer, and would stay in the sums.
    """
    if not windows:
        return
    has_gradient = on_any_rank(
        [window.step_gradient is not None for window in windows], windows[0].deltas.device
    )
    seen = [window for window, has in zip(windows, has_gradient, strict=True) if has]
    if seen:
        _add_steps(seen, scale)
    for window in windows:
        window.sample = None


def _add_steps(windows: Sequence[GradientWindow], scale: float) -> None:
    """Counts the step under way, times `scale`, in all windows where it is finite."""
    gradients = [window.step_mean() for window in windows]
    if scale != 1.0:
        torch._foreach_mul_(gradients, scale)
    device = gradients[0].device
    norms = [norm.to(device) for norm in torch._foreach_norm(gradients, torch.inf)]
    sums, squares, finite = [], [], []
    # One transfer for all of them.
    for window, gradient, keep in zip(
        windows, gradients, torch.stack(norms).isfinite().tolist(), strict=True
    ):
        if not keep:
            window.skip_step()
            continue
        window.num_steps += 1
        if window.sums is None or window.squares is None:
            window.sums, window.squares = gradient, gradient.square()
        else:
            sums.append(window.sums)
            squares.append(window.squares)
            finite.append(gradient)
    if finite:
        torch._foreach_add_(sums, finite)
        torch._foreach_addcmul_(squares, finite, finite)


def _sample(gradient: torch.Tensor) -> torch.Tensor:
    """Every so many-th entry, so that the sample of a sum is the sum of the samples."""
    return gradient[:: max(1, len(gradient) // SAMPLE_SIZE)]
