"""fit() gives all methods the same batches and stops when the loss does."""

import math
import tempfile
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from baselines.contestant import AdamWContestant
from baselines.full import Full
from suites.checkpoint import Checkpoints
from suites.steps import StepMeter
from suites.suite import Recipe, Tuning
from suites.train import DivergedError, LossWatch, Setup, arguments, fit
from tests.suites.arena import ENVIRONMENT

VOCABULARY = 40


def make_model(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


class Collate:
    """Examples are numbers; remembers which were asked for."""

    def __init__(self):
        self.seen = []

    def __call__(self, examples):
        self.seen.append([example["number"] for example in examples])
        ids = torch.tensor([[example["number"], 1, 2] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def train(model, seed=0, num_steps=4, accumulate=1, on_step=lambda step, loss: None, lr=1e-3):
    collate, meter, watch = Collate(), StepMeter("cpu"), LossWatch(on_step)
    examples = [{"number": number} for number in range(VOCABULARY)]
    recipe = Recipe(num_steps=num_steps, batch_size=4, gradient_accumulation_steps=accumulate)
    contestant = Full().prepare(model, None, num_steps)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), None, ENVIRONMENT, None)
        setup = Setup(recipe, Tuning(lr), seed, "cpu", 1, checkpoints)
        optimizer, num_tokens = fit(contestant, examples, collate, setup, meter, watch)
    return collate.seen, meter, watch, optimizer, num_tokens


def test_order_depends_on_the_seed_alone():
    first = train(make_model())[0]
    torch.rand(17)  # a method that drew from the generator before training
    again = train(make_model(seed=5))[0]
    assert first == again
    assert train(make_model(), seed=1)[0] != first


def test_every_step_has_a_loss_and_a_time():
    told = []
    _, meter, watch, _, num_tokens = train(
        make_model(), accumulate=2, on_step=lambda *report: told.append(report)
    )
    assert len(watch.losses) == len(meter.step_seconds) == 4
    assert told == list(enumerate(watch.losses, start=1))
    assert num_tokens == 4 * 2 * 4 * 3  # steps, micro-batches, examples, tokens each


def test_training_is_reproducible_and_learns():
    losses = train(make_model(), num_steps=20, lr=1e-2)[2].losses
    assert losses == train(make_model(), num_steps=20, lr=1e-2)[2].losses
    assert losses[-1] < 0.8 * losses[0]


def test_learning_rate_and_decay_come_from_the_tuning():
    optimizer = train(make_model(), lr=0.25)[3]
    assert optimizer.param_groups[0]["initial_lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.0


def test_divergence_stops_training_at_once():
    model, steps = make_model(), []

    def poison(step, loss):
        steps.append(step)
        with torch.no_grad():
            model.lm_head.weight.fill_(math.nan)

    with pytest.raises(DivergedError, match="the loss is nan at step 2"):
        train(model, on_step=poison)
    assert steps == [1]


@pytest.mark.parametrize("when", ["on_step_begin", "on_step_end"])
def test_a_methods_callbacks_are_charged_to_it(tmp_path, when):
    class Slow(TrainerCallback):
        pass

    setattr(Slow, when, lambda *_, **__: time.sleep(0.02))
    model = make_model()
    given = setup(tmp_path, Tuning(1e-3), num_steps=2, batch_size=4)
    meter, watch = StepMeter("cpu"), LossWatch(lambda step, loss: None)
    examples = [{"number": number} for number in range(VOCABULARY)]
    fit(AdamWContestant(model, [Slow()]), examples, Collate(), given, meter, watch)
    assert all(seconds >= 0.02 for seconds in meter.callback_seconds)


def setup(folder, tuning, **recipe):
    checkpoints = Checkpoints(folder, None, ENVIRONMENT, None)
    return Setup(Recipe(**recipe), tuning, 7, "cpu", 1, checkpoints)


def test_the_trainer_is_told_the_whole_recipe(tmp_path):
    told = arguments(
        setup(
            tmp_path,
            Tuning(1e-3),
            num_steps=40,
            batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_ratio=0.25,
            max_grad_norm=0.5,
        )
    )
    assert (told.max_steps, told.per_device_train_batch_size) == (40, 4)
    assert told.gradient_accumulation_steps == 2
    assert (told.lr_scheduler_type, told.get_warmup_steps(40)) == ("cosine", 10)
    assert (told.max_grad_norm, told.seed, told.data_seed) == (0.5, 7, 7)


def test_padding_is_no_token_and_decay_comes_from_the_tuning(tmp_path):
    class Padded(Collate):
        def __call__(self, examples):
            batch = super().__call__(examples)
            batch["attention_mask"][:, -1] = 0
            return batch

    given = setup(tmp_path, Tuning(1e-3, weight_decay=0.5), num_steps=3, batch_size=4)
    examples = [{"number": number} for number in range(VOCABULARY)]
    contestant = Full().prepare(make_model(), None, 3)
    watch, meter = LossWatch(lambda step, loss: None), StepMeter("cpu")
    optimizer, num_tokens = fit(contestant, examples, Padded(), given, meter, watch)
    assert num_tokens == 3 * 4 * 2
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
