"""SpielConfig: what a SpIEL adapter is, as peft saves and loads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from peft.config import PeftConfig

from spiel.peft_type import add_peft_type

GROWTH = {"ag": "ag", "rigl": "ag", "ma": "ma", "sm3": "ma"}
POLICIES = ("linear", "cosine")
DELTA_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_DENSITY = 0.01


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} {value!r} is unknown, must be one of {', '.join(allowed)}")


def _is_number(value: object, kind: type = Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


@dataclass
class SpielConfig(PeftConfig):
    """Configuration of SpIEL (arXiv 2401.16405): sparse deltas on linear weights.

    The budget is given once: as `density`, as `num_tunable_weights`, or module by module in
    `num_deltas`; if not, it is a density of 0.01. However it was given, injection fills
    `num_deltas`, and that is what is saved.

    Raises:
        ValueError: a field is out of its range; the message names the field and what is allowed.
    """

    growth: str = field(
        default="ag",
        metadata={"help": "How new indices are chosen: 'ag' (alias 'rigl') or 'ma' ('sm3')."},
    )
    density: float | None = field(
        default=None,
        metadata={"help": "Deltas as a share of all parameters, in (0, 1]; by default 0.01."},
    )
    num_tunable_weights: int | None = field(
        default=None, metadata={"help": "Deltas in all, spread in proportion to weight sizes."}
    )
    num_deltas: dict[str, int] | None = field(
        default=None, metadata={"help": "Deltas of each module. Filled at injection, and saved."}
    )
    weight_shapes: dict[str, list[int]] | None = field(
        default=None,
        metadata={"help": "Shape of each weight. Filled at injection, checked on loading."},
    )
    reselection_steps: int = field(
        default=20, metadata={"help": "Optimizer steps from one reselection to the next."}
    )
    selection_accumulation_steps: int = field(
        default=5, metadata={"help": "Steps that a growth window gathers gradients for."}
    )
    initial_reselection_rate: float = field(
        default=0.2, metadata={"help": "Share of the deltas replaced at the start, in [0, 1]."}
    )
    reselection_rate_policy: str = field(
        default="linear", metadata={"help": "How that share falls to 0: 'linear' or 'cosine'."}
    )
    delta_dtype: str = field(
        default="float32", metadata={"help": f"Dtype of the deltas: {', '.join(DELTA_DTYPES)}."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or regex of the linear modules; 'all-linear' when left out."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or regex of modules to leave alone."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Only the layers with these numbers."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that the numbers refer to."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type()
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            self.target_modules = "all-linear"
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        _one_of("growth", self.growth, tuple(GROWTH))
        self.growth = GROWTH[self.growth]
        _one_of("reselection_rate_policy", self.reselection_rate_policy, POLICIES)
        _one_of("delta_dtype", self.delta_dtype, DELTA_DTYPES)
        self._check_budget()
        self._check_schedule()
        self._check_layers()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON can hold them, in the same order every time."""
        fields = super().to_dict()
        return {k: sorted(v) if isinstance(v, set) else v for k, v in fields.items()}

    def _check_budget(self) -> None:
        if self.density is not None and not (_is_number(self.density) and 0 < self.density <= 1):
            raise ValueError(f"density must be a number in (0, 1], got {self.density!r}")
        num = self.num_tunable_weights
        if num is not None and not (_is_number(num, Integral) and num >= 1):
            raise ValueError(f"num_tunable_weights must be an integer of at least 1, got {num!r}")
        for name, k in (self.num_deltas or {}).items():
            if not (_is_number(k, Integral) and k >= 0):
                raise ValueError(f"num_deltas must be integers of at least 0, got {k!r} for {name}")
        if self.density is not None and self.num_tunable_weights is not None:
            raise ValueError("give density or num_tunable_weights, not both")

    def _check_schedule(self) -> None:
        window, interval = self.selection_accumulation_steps, self.reselection_steps
        for name in ("reselection_steps", "selection_accumulation_steps"):
            value = getattr(self, name)
            if not (_is_number(value) and float(value).is_integer()):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            setattr(self, name, int(value))
        if not 1 <= window < interval:
            raise ValueError(
                f"selection_accumulation_steps must be at least 1 and less than reselection_steps "
                f"({interval}), or no growth window would ever close; got {window}"
            )
        rate = self.initial_reselection_rate
        if not (_is_number(rate) and 0 <= rate <= 1):
            raise ValueError(f"initial_reselection_rate must be in [0, 1], got {rate!r}")

    def _check_layers(self) -> None:
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save must be a list of names, got the string {self.modules_to_save!r}"
            )
        if self.layers_to_transform is None:
            if self.layers_pattern is not None:
                raise ValueError("layers_pattern has no meaning without layers_to_transform")
        elif isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise ValueError(
                "layers_to_transform cannot narrow a regex: write the layers into target_modules, "
                f"which is {self.target_modules!r}"
            )
