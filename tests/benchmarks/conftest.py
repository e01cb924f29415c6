"""One set-up for every benchmark: a Llama of 6 layers, 512 wide, and its contestants.

All of them stand in one process and take steps in turn, so that what slows the machine slows all
alike, and ratios mean something where seconds do not.
"""

import ctypes
import os
import statistics
import time
from dataclasses import dataclass

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spiel
from suites.methods import entry_of
from suites.suite import Budget

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
VOCABULARY = 1000
WARM_UP = 3
MANY_STEPS = 10_000
PERIOD = 20  # optimizer steps from one reselection to the next
#: Optimizer steps t by t % PERIOD (see spiel.reselection.Schedule): the first of a growth window
#: chooses its candidates, the last is followed by the exchange, whose support the next one meets.
KINDS = {"choice": (0,), "window": (1, 2, 3, 4), "exchange": (5,), "new support": (6,)}
QUIET = tuple(range(7, PERIOD))


@dataclass(frozen=True)
class Setting:
    """A model's shape, its batch, and the contestants' size: by default those of README's table."""

    #: LoRA of rank 8 has 468,480 weights on all targeted projections.
    budget: str = "r8"
    width: int = 512
    num_layers: int = 6
    batch_size: int = 4
    sequence: int = 256

    def model(self):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=self.width * 43 // 16,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.width // 64,
        )
        return LlamaForCausalLM(config).train()

    def inputs(self):
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (self.batch_size, self.sequence))
        return {"input_ids": tokens, "labels": tokens}


class Runner:
    """A model, and how it takes a step on random tokens."""

    def __init__(self, name, setting):
        self.inputs = setting.inputs()
        self.optimizer, self.reselector = None, None
        if name == "frozen":  # the floor: forward, and backward to the inputs alone
            self.model = setting.model().requires_grad_(False)
            self.model.enable_input_require_grads()
            return
        budget = Budget.parse(setting.budget, TARGETS)
        method = entry_of(name).load()
        contestant = method.prepare(setting.model(), budget, total_steps=MANY_STEPS)
        self.model = contestant.model.train()
        self.optimizer = contestant.optimizer(lr=1e-4, weight_decay=0.0)
        if name.startswith("spiel"):
            self.reselector = spiel.Reselector(self.model, self.optimizer, total_steps=MANY_STEPS)

    def forward(self):
        return self.model(**self.inputs).loss

    def step(self):
        self.forward().backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.reselector is not None:
            self.reselector.step()


def keep_freed_memory():
    """Has glibc keep for the next one what is freed. Else memory goes back to the system now and
    then, and whose step pays for getting it again, up to a tenth of its time, is luck.
    """
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        assert mallopt(trim_threshold, 2**30) and mallopt(mmap_threshold, 2**25)


class Race:
    """Contestants taking steps in turn; `seconds[name]` has one entry for each timed round."""

    def __init__(self, names, setting=Setting()):
        keep_freed_memory()
        torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other tests have one
        self.runners = {name: Runner(name, setting) for name in names}
        self.seconds = {name: [] for name in names}
        for _ in range(WARM_UP):
            self.round(timed=False)

    def round(self, timed=True):
        for name, runner in self.runners.items():
            start = time.perf_counter()
            runner.step()
            if timed:
                self.seconds[name].append(time.perf_counter() - start)

    def ratio(self, name, base, places):
        """Median ratio to `base` in the same round, at the steps t with t % PERIOD in `places`."""
        rounds = enumerate(
            zip(self.seconds[name], self.seconds[base], strict=True), start=WARM_UP + 1
        )
        return statistics.median(own / other for t, (own, other) in rounds if t % PERIOD in places)

    def reselection(self, name):
        """What growth windows and reselections add to the mean step, in steps without them.

        From the median of each kind of step, as a ratio to the floor's in the same round: a mean
        over so few steps would tell more of the machine.
        """
        quiet = self.ratio(name, "frozen", QUIET)
        extra = {kind: self.ratio(name, "frozen", at) / quiet - 1 for kind, at in KINDS.items()}
        share = sum(len(KINDS[kind]) * value for kind, value in extra.items()) / PERIOD
        return extra, share


@pytest.fixture(scope="session")
def race():
    return Race(("frozen", "full", "lora", "shira", "spiel", "spiel-ma"))
