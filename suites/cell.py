"""One cell, top to bottom: suite -> model and data -> prepare -> fit -> evaluate -> record."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from suites import hub, measure, train, yardstick
from suites.budget import is_met
from suites.checkpoint import Checkpoints
from suites.data import Collator, Examples, load_examples
from suites.distributed import Rank
from suites.evaluate import evaluate, flaw
from suites.methods import Contestant
from suites.models import load_model, load_tokenizer, weights_hash
from suites.plan import Cell, Execution
from suites.progress import Report
from suites.provenance import environment
from suites.record import Record, Size, Training, now
from suites.steps import StepMeter
from suites.suite import Suite, placed
from suites.values import given


@dataclass
class Work:
    """A cell under way: what its phases share, and what they leave for the record."""

    cell: Cell
    #: The suite with its paths in place.
    suite: Suite
    rank: Rank
    report: Callable[[Report], None]
    device: str
    meter: measure.Meter
    checkpoints: Checkpoints
    #: The folder that the artifact is kept in; None if it is not.
    artifact: Path | None
    #: Fields of the record, filled as they become known.
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Materials:
    """What a cell loads."""

    model: Any
    tokenizer: Any
    examples: Examples
    collate: Collator


def run(
    cell: Cell,
    world: Path | None,
    out: Path,
    way: Execution,
    rank: Rank,
    report: Callable[[Report], None],
) -> Record:
    """Does the cell's work in this process; what goes wrong is in the record, with what was done.

    `world` is the folder of the suite's embedded world, where it has one. `report` hears of every
    phase and step. Of several ranks, all train and the main one evaluates.
    """
    started_at = now()
    parts: dict[str, Any] = {"world": world.name if world else None}
    status, reason = "ok", ""
    try:
        work = begin(cell, world, out, way, rank, report, parts)
        started_at = work.checkpoints.history.started_at
        _do(work)
    except Exception as error:
        traceback.print_exc()
        status, reason = diagnose(error)
    return Record.of(cell, status, reason, started_at, **parts)


def begin(
    cell: Cell,
    world: Path | None,
    out: Path,
    way: Execution,
    rank: Rank,
    report: Callable[[Report], None],
    parts: dict[str, Any],
) -> Work:
    """Finds the device, the other ranks, and a checkpoint to go on from."""
    device = rank.join(cell.suite.device)
    # As the first rank sees it: all of them must find the same checkpoint.
    here = environment(device.replace(f":{rank.index}", ":0"), rank.num_ranks)
    tell = report if rank.is_main else lambda _: None
    meter = measure.Meter(device, lambda phase: tell(Report(phase)))
    parts |= {"environment": here, "phases": meter.phases}
    checkpoints = Checkpoints(
        cell.checkpoints(out), way.save_seconds, here, parts["world"], rank.is_main, way.force
    )
    if checkpoints.passed_over:
        steps = ", ".join(map(str, checkpoints.passed_over))
        tell(Report(f"passes over checkpoint {steps}: of other code, hardware or libraries"))
    suite = placed(cell.suite, world)
    is_kept = way.keep_artifacts and cell.split == "test" and rank.is_main
    artifact = cell.artifact_path(out) if is_kept else None
    return Work(cell, suite, rank, tell, device, meter, checkpoints, artifact, parts)


def _do(work: Work) -> None:
    entry, suite = work.cell.entry, work.suite
    materials = _load(work)
    model = materials.model
    num_weights, asked = model.num_parameters(), suite.budget.num_weights(model)
    with work.meter.phase("prepare"):
        contestant = entry.load().prepare(model, suite.budget, suite.recipe.num_steps)
    work.parts["size"] = size(contestant, num_weights, asked if entry.matched else None)

    if entry.trains:
        _train(work, contestant, materials)
    work.parts["backend"] = getattr(contestant, "backend", None)
    work.rank.leave()
    if work.rank.is_main:
        _evaluate(work, contestant, materials)


def _load(work: Work) -> Materials:
    suite = work.suite
    with work.meter.phase("load"):
        set_seed(work.cell.seed)
        tokenizer = load_tokenizer(suite.model)
        model = load_model(suite.model, work.device)
        if suite.recipe.gradient_checkpointing:
            # The kind that works with frozen embeddings, as adapters have them.
            model.gradient_checkpointing_enable({"use_reentrant": False})
        # To torch's types a module's field is a Tensor or a Module.
        vocab_size: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        examples = load_examples(suite.data, tokenizer, vocab_size)
        work.parts["loaded"] = contents(suite, model, examples)
    return Materials(model, tokenizer, examples, Collator.of(tokenizer))


def contents(suite: Suite, model: Any, examples: Examples) -> dict[str, str]:
    """What tells the model and the data from other versions of them, and how attention is done.

    Of a mere shape, whose weights follow the seed, only that.
    """
    found = {"attention": str(model.config._attn_implementation)}
    if not suite.model.shape_only:
        found |= {"model weights": weights_hash(model), "training data": examples.hash}
        if commit := hub.cached_commit(suite.model.path, suite.model.revision):
            found["model commit"] = commit
    return found


def _train(work: Work, contestant: Contestant, materials: Materials) -> None:
    """Weighs one forward pass, trains, weighs what came of it; a failure keeps the steps done."""
    saved_bytes = _saved_for_backward(work, contestant, materials)
    recipe, cell = work.suite.recipe, work.cell
    steps = StepMeter(work.device)
    watch = train.LossWatch(
        lambda step, loss: work.report(Report("train", step, recipe.num_steps, loss))
    )
    work.checkpoints.attach(work.meter, steps)
    setup = train.Setup(
        recipe, given(cell.tuning), cell.seed, work.device, work.rank.num_ranks, work.checkpoints
    )
    num_tokens, products = 0, [yardstick.product_seconds(work.device)]
    try:
        with work.meter.phase("train", work.checkpoints.history.cost):
            optimizer, num_tokens = train.fit(
                contestant, materials.examples, materials.collate, setup, steps, watch
            )
        products.append(yardstick.product_seconds(work.device))
    finally:
        work.parts["training"] = dataclasses.replace(
            _training(work, materials.examples, steps, watch),
            num_tokens=num_tokens,
            yardstick_seconds=tuple(products),
        )
    work.parts["training"] = dataclasses.replace(
        work.parts["training"], optimizer=train.settings(optimizer)
    )
    artifact_bytes = measure.artifact_bytes(contestant.artifact, work.artifact)
    if work.artifact is not None and artifact_bytes is None:
        work.report(Report("the artifact could not be kept: the log says why"))
    work.parts["size"] = dataclasses.replace(
        work.parts["size"],
        saved_for_backward_bytes=saved_bytes,
        optimizer_state_bytes=measure.optimizer_state_bytes(optimizer),
        artifact_bytes=artifact_bytes,
    )


def _saved_for_backward(work: Work, contestant: Contestant, materials: Materials) -> int:
    """Bytes that autograd keeps of one batch of this rank."""
    batch_size, _ = train.local_batch(work.suite.recipe, work.rank.num_ranks)
    batch = materials.collate(materials.examples[:batch_size])
    batch = {name: tensor.to(work.device) for name, tensor in batch.items()}
    return measure.saved_for_backward_bytes(contestant.model, batch)


def _training(work: Work, examples: Examples, steps: StepMeter, watch: train.LossWatch) -> Training:
    flops = steps.first_step_flops
    return Training(
        tuple(watch.losses),
        tuple(steps.step_seconds),
        tuple(steps.callback_seconds),
        num_examples=len(examples),
        num_dropped=examples.num_dropped,
        num_truncated=examples.num_truncated,
        # Every rank counts its own share of the batch.
        first_step_flops=None if flops is None else flops * work.rank.num_ranks,
        resumed_at=work.checkpoints.history.resumed_at,
    )


def _evaluate(work: Work, contestant: Contestant, materials: Materials) -> None:
    suite, tasks = work.suite, work.suite.tasks_of(work.cell.split)
    if not tasks:
        return
    with work.meter.phase("evaluate"):
        scores = evaluate(
            contestant.model,
            materials.tokenizer,
            tasks,
            suite.task_folder,
            suite.eval_batch_size,
            suite.limit,
            suite.allow_code_execution,
            lambda name: work.report(Report(f"evaluate {name}")),
        )
    flaws = {name: found for name, score in scores.items() if (found := flaw(score))}
    work.parts["scores"] = {name: scores[name] for name in scores if name not in flaws}
    if flaws:  # which no record can hold
        told = [f"task {name} scored {found}" for name, found in flaws.items()]
        raise train.DivergedError("; ".join(told))


def diagnose(error: Exception) -> tuple[str, str]:
    """Status and reason of a cell that ended in `error`."""
    if isinstance(error, train.DivergedError):
        return "diverged", str(error)
    reason = f"{type(error).__name__}: {str(error) or _place(error)}".strip().split("\n")[0]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "oom", reason
    # torch's CPU allocator has no exception of its own.
    if isinstance(error, RuntimeError) and "can't allocate memory" in str(error):
        return "oom", reason
    return "failed", reason


def _place(error: Exception) -> str:
    """Where an error without a message comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1:]
    return "".join(f"in {Path(frame.filename).name}, line {frame.lineno}" for frame in last)


def size(contestant: Contestant, num_weights: int, num_asked: int | None) -> Size:
    """What was asked and what the method made of it."""
    met = contestant.num_trainable
    matched = num_asked is not None and is_met(num_asked, met)
    trained = [weight for weight in contestant.model.parameters() if weight.requires_grad]
    dtypes = sorted({str(weight.dtype).removeprefix("torch.") for weight in trained})
    config = adapter_config(contestant.model)
    return Size(num_weights, met, num_asked, matched, tuple(dtypes), adapter_config=config)


def adapter_config(model: torch.nn.Module) -> dict[str, Any]:
    """Of peft's model with one adapter its config, as JSON has it; else empty."""
    configs = list(getattr(model, "peft_config", {}).values())
    if len(configs) != 1:
        return {}
    plain = json.dumps(configs[0].to_dict(), default=_plain)
    values: dict[str, Any] = json.loads(plain)
    return values


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)
