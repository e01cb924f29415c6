"""What a cell will need, before it runs: weights it trains, memory by shapes, time by records.

Memory, in bytes, of one process:

- weights: every parameter and buffer in its dtype; 4-bit linears 4.127 bits a weight (QLoRA,
  arXiv 2305.14314, section 3); what the method trains in fp32, unless its options have it in the
  model's dtype. Full fine-tuning in fp32 computes with copies in that dtype.
- gradients: the trained weights in their dtype; optimizer: twice that, the moments of Adam.
- activations, for T tokens of one micro-batch in a model of width h, MLP width m, key and value
  width k and b bytes an element: a layer keeps T (b (6 h + 2 k + 4 m) + 8 h): inputs and outputs
  of attention and MLP, and what the norms keep in fp32; the loss keeps T V (b + 8) over V words.
  With gradient checkpointing: one layer in full, and T h b for each.

What is left out: indices of sparse methods, workspaces, fragmentation, and attention that keeps its
scores.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from suites import models, record
from suites.distributed import share
from suites.plan import Cell, Execution
from suites.provenance import Environment
from suites.record import DamagedRecordError, Record
from suites.sources import ModelSource
from suites.suite import WORLD, Suite
from suites.world import World

#: Bytes of a weight in NF4 with double quantisation.
NF4_BYTES = 4.127 / 8


@dataclass(frozen=True)
class Estimate:
    """Of one method's cells."""

    num_asked: int
    num_trainable: int
    weights_bytes: float
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float

    @property
    def total_bytes(self) -> float:
        parts = (self.weights_bytes, self.gradient_bytes, self.optimizer_bytes)
        return sum(parts) + self.activation_bytes


def estimate(cell: Cell, way: Execution) -> Estimate:
    """Asks the method its size on a model without values; raises ValueError as that does."""
    suite = cell.suite
    model = meta_model(suite)
    size = size_of(cell, suite)
    held = getattr(torch, suite.model.dtype).itemsize
    trained = 4 if cell.entry.options.get("in_fp32", True) else held
    # The weights that are trained are the model's own, or beside them.
    is_beside = size != model.num_parameters() or trained != held
    trained_bytes = size * trained
    needed = activation_bytes(model.config, suite, way.num_processes) if cell.entry.trains else 0
    return Estimate(
        num_asked=suite.budget.num_weights(model),
        num_trainable=size,
        weights_bytes=_held_bytes(model, suite.model.quantize) + is_beside * trained_bytes,
        gradient_bytes=trained_bytes,
        optimizer_bytes=2 * trained_bytes,
        activation_bytes=needed,
    )


def size_of(cell: Cell, suite: Suite) -> int:
    """Weights that the cell's method trains in `suite`, which is the cell's own or that with its
    paths in place.

    Raises ValueError if the method cannot have the size, or cannot be trained for so few steps.
    """
    method, num_steps = cell.entry.load(), suite.recipe.num_steps
    min_steps = getattr(method, "min_steps", 1)
    if num_steps < min_steps:
        raise ValueError(
            f"{cell.method} is trained for at least {min_steps} steps, got {num_steps}: "
            "--steps, or the suite's num_steps"
        )
    return method.size(meta_model(suite), suite.budget)


def meta_model(suite: Suite) -> Any:
    """The suite's model on the meta device, in its dtype; of an embedded world, unbuilt or not."""
    return _meta_model(suite.model, suite.world if suite.model.path.startswith(WORLD) else None)


@lru_cache(maxsize=1)  # methods leave it as it is
def _meta_model(source: ModelSource, world: World | None) -> Any:
    if world is None:
        return models.empty_model(source)
    from suites import embedded_base, embedded_facts

    tokenizer = embedded_base.make_tokenizer(embedded_facts.vocabulary(world))
    return models.empty_model(source, embedded_base._config(world, tokenizer))


def _held_bytes(model: torch.nn.Module, quantize: str | None) -> float:
    """Of all parameters and buffers, each once; with `quantize` its linears in 4 bits."""
    packed = {
        id(module.weight)
        for name, module in model.named_modules()
        if quantize and isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(
        tensor.numel() * (NF4_BYTES if name in packed else tensor.element_size())
        for name, tensor in tensors.items()
    )


def activation_bytes(config: Any, suite: Suite, num_ranks: int = 1) -> float:
    """What the backward pass of one micro-batch at full length needs, by the formula above."""
    recipe = suite.recipe
    batch_size, _ = share(recipe.batch_size, recipe.gradient_accumulation_steps, num_ranks)
    num_tokens = batch_size * suite.data.max_length
    element = getattr(torch, suite.model.dtype).itemsize
    width = config.hidden_size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // config.num_attention_heads
    mlp_width = getattr(config, "intermediate_size", None) or 4 * width
    elements = 6 * width + 2 * heads * head_width + 4 * mlp_width
    layer = num_tokens * (element * elements + 8 * width)
    loss = num_tokens * config.vocab_size * (element + 8)
    if recipe.gradient_checkpointing:
        return layer + config.num_hidden_layers * num_tokens * width * element + loss
    return config.num_hidden_layers * layer + loss


def seconds(cell: Cell, records: Iterable[Record]) -> float | None:
    """How long the cell will take, as the mean over `records` that did the same a step."""
    num_steps = cell.suite.recipe.num_steps
    found = [
        sum(cost.seconds for name, cost in each.phases.items() if name != "train")
        + num_steps * _step_seconds(each)
        for each in records
        if each.method_name == cell.method and _is_alike(each, cell)
    ]
    return statistics.fmean(found) if found else None


def _step_seconds(found: Record) -> float:
    steps = found.training.step_seconds
    return statistics.fmean(steps[1:] or steps) if steps else 0.0


def _is_alike(found: Record, cell: Cell) -> bool:
    """Whether a step and the evaluation of `found` are those of `cell`."""
    theirs, ours = dict(found.suite), cell.suite.to_dict()
    for values in (theirs, ours):
        values["recipe"] = {k: v for k, v in values["recipe"].items() if k != "num_steps"}
    alike = ("model", "data", "recipe", "budget", "tasks", "limit", "world", "eval_batch_size")
    same = all(theirs.get(name) == ours[name] for name in alike)
    return same and found.split == cell.split and bool(found.phases)


def earlier_records(out: Path, here: Environment) -> list[Record]:
    """The finished records in the results folder `out` that were made on hardware like `here`."""
    found = []
    for path in (out / "records").rglob("*.json"):
        try:
            each = record.read(path)
        except DamagedRecordError:
            continue
        is_here = each.environment is not None and each.environment.hardware == here.hardware
        if each.status == "ok" and is_here:
            found.append(each)
    return found
