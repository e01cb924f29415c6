"""How many weights a method may train: the size at which methods are compared."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from suites.values import added

ALLOWED = (
    "r64 (as many weights as LoRA of rank 64), 500000 (that many weights) or 0.01 (that share of "
    "all the model's weights, between 0 and 1)"
)


@dataclass(frozen=True)
class Budget:
    """Exactly one of `lora_rank`, `num_trainable` and `density` is given.

    `lora_rank`: as many weights as LoRA of that rank has on `target_modules`, the SpIEL paper's
    definition (arXiv 2401.16405, section 4.1). `num_trainable`: that many. `density`: that share
    of all the model's weights, in (0, 1). Methods solve for their own size. `target_modules` are
    the last parts of the names of the modules that most methods change.
    """

    lora_rank: int | None = None
    target_modules: tuple[str, ...] = ()
    num_trainable: int | None = added(None)
    density: float | None = added(None)

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("lora_rank", "num_trainable", "density")}
        given = {name: value for name, value in sizes.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"a budget has one of {', '.join(sizes)}; got {given or 'none'}")
        for name, value in given.items():
            if value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.density is not None and self.density >= 1:
            raise ValueError(f"density must be below 1, got {self.density}")
        if isinstance(self.target_modules, str):
            raise ValueError(
                f"target_modules is the string {self.target_modules!r}; allowed: a tuple or list "
                f"of names, as ({self.target_modules!r},)"
            )
        if not self.target_modules:
            raise ValueError("target_modules is empty")

    @classmethod
    def parse(cls, text: str, target_modules: Sequence[str]) -> Budget:
        """`r64` is a LoRA rank, `500000` a number of weights, `0.01` a density.

        Raises ValueError that names the three forms for anything else.
        """
        targets = tuple(target_modules)
        try:
            if re.fullmatch("r[0-9]+", text):
                return cls(lora_rank=int(text[1:]), target_modules=targets)
            if re.fullmatch("[0-9]+", text):
                return cls(num_trainable=int(text), target_modules=targets)
            if re.fullmatch(r"[0-9]*\.?[0-9]+(e-[0-9]+)?", text):
                return cls(density=float(text), target_modules=targets)
        except ValueError as error:
            raise ValueError(f"budget {text!r}: {error}; allowed: {ALLOWED}") from error
        raise ValueError(f"budget {text!r} is unknown; allowed: {ALLOWED}")

    @property
    def label(self) -> str:
        """Short, for the names of files; `parse` reads it: `r64`, `500000`, `0.01`."""
        if self.lora_rank is not None:
            return f"r{self.lora_rank}"
        return str(self.num_trainable or self.density)

    def num_weights(self, model: Any) -> int:
        """Trainable weights that this allows on `model`, a transformers model, quantised or not.

        Raises ValueError if the model lacks one of the targeted modules, or if the density comes
        to less than one weight.
        """
        num_sides = self.num_sides(model)
        if self.lora_rank is not None:
            return self.lora_rank * num_sides
        if self.num_trainable is not None:
            return self.num_trainable
        assert self.density is not None
        num_all = model.num_parameters()
        if self.density * num_all < 1:
            raise ValueError(f"density {self.density} of {num_all} weights is less than one weight")
        return round(self.density * num_all)

    def num_sides(self, model: Any) -> int:
        """What one rank of LoRA costs: the sum of inputs + outputs over the targeted modules."""
        shapes = self.target_shapes(model)
        found = {name.split(".")[-1] for name in shapes}
        lacking = [name for name in self.target_modules if name not in found]
        if lacking:
            has = ", ".join(_linears(model)) or "no linears"
            raise ValueError(
                f"the model has no module {', '.join(lacking)} of the targeted ones; it has {has}, "
                "which a suite file can name as its budget's target_modules"
            )
        return sum(sum(shape) for shape in shapes.values())

    def target_shapes(self, model: Any) -> dict[str, tuple[int, int]]:
        """The shape of each targeted weight by its module's full name, unpacked from any 4 bits."""
        return {
            name: (module.out_features, module.in_features)
            if hasattr(module, "out_features")
            else tuple(module.weight.shape)  # GPT-2's Conv1D has no such fields
            for name, module in model.named_modules()
            if name.split(".")[-1] in self.target_modules and hasattr(module, "weight")
        }


def is_met(num_asked: int, num_trainable: int) -> bool:
    """Whether so many weights are those that were asked for, to within 1 %."""
    return abs(num_trainable - num_asked) <= 0.01 * num_asked


def _linears(model: Any) -> list[str]:
    """The last parts of the names of the modules that a budget could target."""
    names = {
        name.split(".")[-1]: None
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not hasattr(module, "num_embeddings")
    }
    return [name for name in names if name != "lm_head"]
