"""GradientWindow: what AG gathers of one weight's gradient between two reselections."""

from __future__ import annotations

from typing import Any

import torch

from spiel import ops
from spiel.ops.blocked import Reduce, largest_gradients


class GradientWindow:
    """The gradients of a weight's growth candidates over a few optimizer steps.

    The first micro-batch of the window chooses the candidates: the k largest |dL/dW| of the whole
    weight. From then on, and for that micro-batch too, only their gradients are kept: summed over
    the micro-batches of an optimizer step, and of these step gradients the sum and the sum of
    squares over steps. Sums are fp32 whatever the model's dtype; steps are counted as an integer.

    Memory: while open 12 bytes and an index for each candidate, 4 more from backward to step.
    """

    def __init__(self, num_candidates: int, reduce: Reduce | None = None) -> None:
        self.num_candidates = num_candidates
        self.num_steps = 0
        self._reduce = reduce
        self.candidates: torch.Tensor | None = None  # [k] flat indices, sorted
        self.step_gradient: torch.Tensor | None = None  # [k], of the step under way
        self.sums: torch.Tensor | None = None  # [k]
        self.squares: torch.Tensor | None = None  # [k]

    def observe(self, left_TR: torch.Tensor, right_TC: torch.Tensor) -> None:
        """Takes in one micro-batch, whose dL/dW is left.T @ right."""
        if self.candidates is None:
            self.candidates, self.step_gradient = largest_gradients(
                left_TR, right_TC, self.num_candidates, self._reduce
            )
            return
        gradient = ops.sampled_gradient(left_TR, right_TC, self.candidates)
        if self.step_gradient is None:
            self.step_gradient = gradient
        else:
            self.step_gradient += gradient

    def end_step(self, scale: float = 1.0) -> None:
        """Closes an optimizer step, whose gradient the optimizer saw times `scale`."""
        gradient, self.step_gradient = self.step_gradient, None
        if gradient is None:
            return
        gradient = gradient if scale == 1.0 else gradient * scale
        if self.sums is None or self.squares is None:
            self.sums, self.squares = gradient, gradient.square()
        else:
            self.sums += gradient
            self.squares.addcmul_(gradient, gradient)
        self.num_steps += 1

    def skip_step(self) -> None:
        """Forgets the step under way, which the optimizer did not take."""
        self.step_gradient = None
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
