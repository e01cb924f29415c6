"""How large a method's knob must be for a budget; weights are counted on a copy without values."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from peft import PeftConfig, PeftType, get_peft_model
from transformers import PreTrainedModel

#: How far from a budget a size may be and still count as meeting it.
TOLERANCE = 0.01

#: What stands in for options that need the values of weights, or that make frozen ones one by one
#: (thousands of bases), by peft's name of the method.
WITHOUT_VALUES: dict[str, dict[str, Any]] = {
    "SHIRA": {"mask_fn": None},
    "RANDLORA": {"sparse": True},
}


class Counter:
    """`count_trainable` for many configs of one method on one model, in a fraction of the time.

    Once a count has shown that all is in the decoder layers and that each of them has as much, the
    next counts are made on one layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        self.are_alike: bool | None = None

    def __call__(self, config: PeftConfig) -> int:
        if self.are_alike:
            return self.num_layers * count_trainable(self.model, config, num_layers=1)
        whole = count_trainable(self.model, config)
        if self.are_alike is None:
            self.are_alike = self._foretells(whole, config)
        return whole

    def _foretells(self, whole: int, config: PeftConfig) -> bool:
        try:
            return whole == self.num_layers * count_trainable(self.model, config, num_layers=1)
        except Exception:  # of any class: an architecture that cannot have one layer
            return False


def count_trainable(
    model: PreTrainedModel, config: PeftConfig, num_layers: int | None = None
) -> int:
    """Weights that peft would train on `model`, which stays as it is.

    Quantised or not, its architecture is built anew on the meta device, so this takes no memory
    and well under a second for seven billion weights. With `num_layers` it has so many decoder
    layers instead of its own. Raises what peft raises for `config`.
    """
    config = copy.deepcopy(config)
    for name, value in WITHOUT_VALUES.get(PeftType(config.peft_type), {}).items():
        setattr(config, name, value)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shape = copy.deepcopy(model.config)
        if num_layers is not None:
            shape.get_text_config().num_hidden_layers = num_layers
        hollow = type(model)(shape)
        adapted = get_peft_model(hollow, config)
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def solve(count: Callable[[int], int], asked: int, largest: int, refusal: str) -> int:
    """The knob in [1, largest] whose count is nearest to `asked`.

    `count` grows or falls with the knob, and raises ValueError for a knob that can't be. Raises
    ValueError, `refusal` and the largest count there is, if that falls short of `asked`.
    """

    @cache
    def tally(knob: int) -> float:
        try:
            return count(knob)
        except ValueError:
            return float("inf")

    falls = tally(1) > tally(largest)
    knobs = range(largest, 0, -1) if falls else range(1, largest + 1)
    place = first_above(tally, knobs, asked)
    most = max((tally(knob) for knob in knobs[max(0, place - 1) : place + 1]), key=_if_finite)
    if most == float("inf"):
        count(1)  # raises what is wrong with every knob
    require_enough(most, asked, refusal)
    # What falls with the knob falls in steps, as the bases of RandLoRA: the next one may be nearer.
    reach = 8 if falls else 1
    near = knobs[max(0, place - reach) : place + reach]
    return min(near, key=lambda knob: abs(tally(knob) - asked))


def first_above(tally: Callable[[int], float], knobs: Sequence[int], asked: float) -> int:
    """The place in `knobs`, by which `tally` never falls, of the first that exceeds `asked`.

    Guesses by a straight line, which most counts follow, and by halves in turn: few are counted.
    """
    low, high = 0, len(knobs) - 1
    if tally(knobs[low]) > asked:
        return low
    if tally(knobs[high]) <= asked:
        return len(knobs)
    is_lines_turn = True
    while high - low > 1:
        below, above = tally(knobs[low]), tally(knobs[high])
        guess = (low + high) // 2
        if is_lines_turn and above < float("inf"):
            guess = low + int((high - low) * (asked - below) / (above - below))
        guess = min(max(guess, low + 1), high - 1)
        low, high = (low, guess) if tally(knobs[guess]) > asked else (guess, high)
        is_lines_turn = not is_lines_turn
    return high


def _if_finite(count: float) -> float:
    return count if count < float("inf") else -1


def require_enough(most: float, asked: int, refusal: str) -> None:
    """Raises ValueError if `most`, all that a method can have, falls short of `asked` weights."""
    if most < (1 - TOLERANCE) * asked:
        raise ValueError(f"{refusal}; the most it can have is {most}")


def full_rank(shapes: Mapping[str, tuple[int, int]]) -> int:
    """The largest rank that a change of any of the weights can have, by their shapes."""
    return max(min(shape) for shape in shapes.values())
