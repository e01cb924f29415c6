"""Quorum: which growth windows may choose their candidates in a backward pass, on all ranks."""

from __future__ import annotations

from collections.abc import Collection

import torch

from spiel.distributed import is_parallel, on_all_ranks
from spiel.tap import is_wanted
from spiel.window import GradientWindow


class Quorum:
    """Lets a window choose where its weight has a gradient on every data-parallel rank.

    The choice averages gradients over ranks in the midst of backward, so a rank on which a weight
    takes no part (an expert that no token was sent to) would leave the others waiting. As long as
    a window lacks candidates, ranks ask each other once in a backward pass, before anything else,
    what gets a gradient in it; a window that may not choose waits for the next micro-batch. So in
    every backward pass each rank must use at least one adapted layer.
    """

    def __init__(self, windows: Collection[GradientWindow]) -> None:
        self.windows = windows
        self._backward_pass = -1
        self._admitted: set[int] = set()

    def __call__(self, window: GradientWindow) -> bool:
        """Whether `window`, whose weight gets its gradient now, may choose its candidates."""
        if not is_parallel():
            return True
        under_way = torch._C._current_graph_task_id()
        if under_way != self._backward_pass:
            self._backward_pass = under_way
            self._admitted = self._ask()
        if id(window) not in self._admitted:
            return False
        self._admitted.remove(id(window))  # a weight used twice chooses once, on all ranks
        return True

    def _ask(self) -> set[int]:
        waiting = [window for window in self.windows if window.candidates is None]
        if not waiting:
            return set()
        flags = [is_wanted(window.deltas) for window in waiting]
        agreed = on_all_ranks(flags, waiting[0].deltas.device)
        return {id(window) for window, all_do in zip(waiting, agreed, strict=True) if all_do}
