"""One set-up for every benchmark: a Llama of 6 layers, 512 wide, and its contestants.

All of them stand in one process and take steps in turn, so that what slows the machine slows all
alike, and ratios mean something where seconds do not.
"""

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


@dataclass(frozen=True)
class Setting:
    """A model's shape, its batch, and the contestants' size: here the issue's, changed to taste."""

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


class Race:
    """Contestants taking steps in turn; `seconds[name]` has one entry for each timed round."""

    def __init__(self, names, setting=Setting()):
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

    def ratio(self, name, base, rounds=None):
        """Median over `rounds`, by their numbers, of the ratio to `base` in the same round."""
        own, other = self.seconds[name], self.seconds[base]
        return statistics.median(own[i] / other[i] for i in rounds or range(len(own)))


@pytest.fixture(scope="session")
def race():
    return Race(("frozen", "full", "lora", "shira", "spiel", "spiel-ma"))
