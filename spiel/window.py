"""GradientWindow: what AG gathers of one weight's gradient between two reselections."""

from __future__ import annotations

from typing import Any

import torch

from spiel.distributed import average_
from spiel.ops.blocked import largest_gradients

#: A scale that is off by less is rounding.
SCALE_TOLERANCE = 1e-5


class GradientWindow:
    """The gradients of a weight's growth candidates over a few optimizer steps.

    The first micro-batch of the window chooses the candidates: the k largest |dL/dW| of the whole
    weight. From then on, and for that micro-batch too, only their gradients are kept: summed over
    the micro-batches of an optimizer step, and of these step gradients the sum and the sum of
    squares over steps. Sums are fp32 whatever the model's dtype; steps are counted as an integer.

    All of it is averaged over data-parallel ranks: the whole weight's gradient, block by block, on
    the micro-batch that chooses, and the candidates' gradients once in every optimizer step.

    Memory: while open 8 bytes and an index for each candidate, 4 more from backward to step.

    Args:
        num_candidates: k.
        is_probe: also keep the gradient of the active weights, for `measure_scale`.
    """

    def __init__(self, num_candidates: int, is_probe: bool = False) -> None:
        self.num_candidates = num_candidates
        self.is_probe = is_probe
        self.num_steps = 0
        self.active_gradient: torch.Tensor | None = None  # [k], of the step under way
        self.candidates: torch.Tensor | None = None  # [k] flat indices, sorted
        self.step_gradient: torch.Tensor | None = None  # [k], of the step under way
        self.sums: torch.Tensor | None = None  # [k]
        self.squares: torch.Tensor | None = None  # [k]

    def observe(
        self,
        left_TR: torch.Tensor,
        right_TC: torch.Tensor,
        active_gradient: torch.Tensor,
        candidate_gradient: torch.Tensor | None,
    ) -> None:
        """Takes in one micro-batch, whose dL/dW is left.T @ right, with its entries [k] at the
        support and, once they are chosen, at the candidates.
        """
        if self.is_probe:
            self.active_gradient = _plus(self.active_gradient, active_gradient)
        if candidate_gradient is None:
            self.candidates, self.step_gradient = largest_gradients(
                left_TR, right_TC, self.num_candidates, average_
            )
        else:
            self.step_gradient = _plus(self.step_gradient, candidate_gradient)

    def measure_scale(self, gradient: torch.Tensor) -> float:
        """What became of the gradient between backward and the optimizer: `gradient` [k] of the
        active weights, as the optimizer is about to see it, over what backward gave.

        Clipping and the loss scaling of fp16 training change all gradients by one factor, so the
        candidates' must change by it too. 1 where nothing can be said.
        """
        if self.active_gradient is None:
            return 1.0
        average_(self.active_gradient)
        norm = self.active_gradient.square().sum()
        scale = float((self.active_gradient * gradient).sum() / norm) if norm > 0 else 1.0
        return 1.0 if abs(scale - 1.0) < SCALE_TOLERANCE else scale

    def end_step(self, scale: float = 1.0) -> None:
        """Closes an optimizer step, whose gradient the optimizer saw times `scale`."""
        gradient, self.step_gradient, self.active_gradient = self.step_gradient, None, None
        if gradient is None:
            return
        average_(gradient)
        if scale != 1.0:
            gradient *= scale
        if self.sums is None or self.squares is None:
            self.sums, self.squares = gradient, gradient.square()
        else:
            self.sums += gradient
            self.squares.addcmul_(gradient, gradient)
        self.num_steps += 1

    def skip_step(self) -> None:
        """Forgets the step under way, which the optimizer did not take."""
        self.step_gradient = self.active_gradient = None
        if self.num_steps == 0:
            self.candidates = None

    def state_dict(self) -> dict[str, Any]:
        """Between optimizer steps this is all there is to know."""
        return {
            "num_steps": self.num_steps,
            "candidates": self.candidates,
            "sums": self.sums,
            "squares": self.squares,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.num_steps = state["num_steps"]
        for name in ("candidates", "sums", "squares"):
            value = state[name]
            setattr(self, name, None if value is None else value.to(device))


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part.clone() if total is None else total.add_(part)
