"""How many deltas each targeted weight gets."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from spiel.config import DEFAULT_DENSITY, SpielConfig


def count_parameters(model: nn.Module) -> int:
    """All parameters of the base model, those of earlier injections not counted.

    A weight packed into 4 bits counts as the weight it stands for.
    """
    added = (".spiel_deltas.", ".modules_to_save.")
    own = (p for name, p in model.named_parameters() if not any(part in name for part in added))
    packed = ((p, getattr(p, "quant_state", None)) for p in own)
    return sum(p.numel() if state is None else math.prod(state.shape) for p, state in packed)


def share_out(total: int, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """Spreads `total` deltas over weights in proportion to size: int(total x numel / sum).

    Raises:
        ValueError: there are fewer weights than that, or so few deltas that no weight gets one.
    """
    numels = {name: rows * cols for name, (rows, cols) in shapes.items()}
    all_numel = sum(numels.values())
    if total > all_numel:
        raise ValueError(
            f"the budget of {total} deltas is more than the {all_numel} targeted weights; lower "
            "density or num_tunable_weights, or target more modules"
        )
    shares = {name: int(total * numel / all_numel) for name, numel in numels.items()}
    if not any(shares.values()):
        raise ValueError(
            f"the budget of {total} deltas is too small to be spread over {len(shares)} weights; "
            "raise density or num_tunable_weights"
        )
    return shares


def total_deltas(config: SpielConfig, num_parameters: int) -> int:
    if config.num_tunable_weights is not None:
        return config.num_tunable_weights
    if config.density is None:
        config.density = DEFAULT_DENSITY
    return int(config.density * num_parameters)


def check_saved(config: SpielConfig, shapes: Mapping[str, tuple[int, int]]) -> None:
    assert config.num_deltas is not None
    for name in config.num_deltas:
        if name not in shapes:
            raise ValueError(
                f"num_deltas names {name}, which is no targeted module of this model: it must be "
                "the base model that the adapter was made for"
            )
    for name, shape in shapes.items():
        if name not in config.num_deltas:
            raise ValueError(f"num_deltas has no entry for the targeted module {name}")
        saved = (config.weight_shapes or {}).get(name, list(shape))
        if tuple(saved) != shape:
            raise ValueError(
                f"{name}: the adapter was made for a weight of shape {tuple(saved)}, "
                f"this model's has {shape}"
            )
        if not 0 <= config.num_deltas[name] <= shape[0] * shape[1]:
            raise ValueError(
                f"{name}: num_deltas {config.num_deltas[name]} is not between 0 and the weight's "
                f"{shape[0] * shape[1]} entries"
            )
