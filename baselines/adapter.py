"""Any tuner of peft as a contestant: its config, and the field that sets its size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel, TrainerCallback

from baselines import sizing
from baselines.contestant import AdamWContestant, adapted

#: Train steps where their number is not known yet and does not change a size.
MANY = 10**9


@dataclass(frozen=True)
class Adapter:
    """A method of peft by its own name of it, as `LORA`.

    `config`: fields of its config; one that is absent is peft's default, but `target_modules`,
    which is then the budget's. `knob`: the whole-numbered field that is solved from the budget;
    None leaves the size as `config` has it. `per_knob`: fields that are so many times the knob.
    `seed`: the field that takes a seed, which is drawn from torch's.
    """

    name: str
    peft_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    knob: str | None = None
    per_knob: Mapping[str, float] = field(default_factory=dict)
    seed: str | None = None

    def prepare(self, model: PreTrainedModel, budget: Any, total_steps: int) -> AdamWContestant:
        config = self._solved(model, budget, total_steps)
        if self.seed is not None:
            setattr(config, self.seed, int(torch.randint(2**31, ())))
        contestant = adapted(self.name, model, config)
        if not hasattr(contestant.model.base_model, "update_and_allocate"):
            return contestant
        return AdamWContestant(contestant.model, [Allocation(contestant.model.base_model)])

    def size(self, model: PreTrainedModel, budget: Any) -> int:
        return sizing.count_trainable(model, self._solved(model, budget))

    def _solved(self, model: PreTrainedModel, budget: Any, total_steps: int = MANY) -> PeftConfig:
        sized = {} if self.knob is None else self._sized(self._solve(model, budget))
        options = {**self.config, **sized}
        return make_config(self.peft_type, options, budget.target_modules, total_steps)

    def _sized(self, size: int) -> dict[str, Any]:
        assert self.knob is not None
        return {self.knob: size} | {name: size * each for name, each in self.per_knob.items()}

    def _solve(self, model: PreTrainedModel, budget: Any) -> int:
        asked, counter = budget.num_weights(model), sizing.Counter(model)

        def count(size: int) -> int:
            sized = {**self.config, **self._sized(size)}
            return counter(make_config(self.peft_type, sized, budget.target_modules))

        refusal = f"{self.name} cannot have {asked} weights (budget {budget.label})"
        return sizing.solve(count, asked, self._largest(model, budget, asked), refusal)

    def _largest(self, model: PreTrainedModel, budget: Any, asked: int) -> int:
        """What to search the knob below: where it has a meaning, or what no count exceeds."""
        text = model.config.get_text_config()
        if self.knob == "num_virtual_tokens" and not hasattr(text, "rope_parameters"):
            return text.max_position_embeddings  # places are looked up in a table of that length
        if self.knob == "r":
            return sizing.full_rank(budget.target_shapes(model))
        return asked


class Allocation(TrainerCallback):
    """Has methods that move weights between modules (AdaLoRA) do so, while gradients are there."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.tuner.update_and_allocate(state.global_step)


def make_config(
    peft_type: str,
    options: Mapping[str, Any],
    target_modules: tuple[str, ...],
    total_steps: int = MANY,
) -> PeftConfig:
    """peft's config for causal language models with `options`, told `total_steps` if it asks.

    Raises ValueError, with what is allowed, for a method or a field that this version of peft does
    not know, and what peft raises for a value that it refuses.
    """
    known = _defaults(peft_type)
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{peft_type} has no option {name!r}; it has {', '.join(known)}")
        if type(known[name]) in (int, float) and isinstance(value, str):
            raise ValueError(f"{name} of {peft_type} must be a number, got {value!r}")
    values = {"task_type": "CAUSAL_LM", **options}
    if "target_modules" in known:
        values.setdefault("target_modules", list(target_modules))
    if "total_step" in known:
        values["total_step"] = total_steps
    return PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)](**values)


def _defaults(peft_type: str) -> dict[str, Any]:
    """The fields of peft's config, and the default of each."""
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"peft_type {peft_type!r} is unknown to this peft, which has {known}")
    # peft_type is the class's own, as is inference_mode of an adapter that is to be trained.
    own = ("peft_type", "inference_mode")
    every = fields(PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)])
    return {each.name: each.default for each in every if each.name not in own}
