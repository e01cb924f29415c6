"""One set-up for every benchmark: a Llama of 6 layers, 512 wide, and its contestants.

All of them stand in one process and take steps in turn, so that what slows the machine slows all
alike, and ratios mean something where seconds do not.
"""

import os
import statistics
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spiel
from suites.methods import entry_of
from suites.suite import Budget

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: All targeted projections have 468,480 weights in LoRA of rank 8.
BUDGET = Budget(lora_rank=8, target_modules=TARGETS)
BATCH, SEQUENCE, VOCABULARY = 4, 256, 1000
WARM_UP = 3


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=6,
        num_attention_heads=8,
    )
    return LlamaForCausalLM(config).train()


class Runner:
    """A model, and how it takes a step on random tokens."""

    def __init__(self, name):
        torch.manual_seed(0)
        tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE))
        self.inputs = {"input_ids": tokens, "labels": tokens}
        self.optimizer, self.reselector = None, None
        if name == "frozen":  # the floor: forward, and backward to the inputs alone
            self.model = small_llama().requires_grad_(False)
            self.model.enable_input_require_grads()
            return
        contestant = entry_of(name).load().prepare(small_llama(), BUDGET, total_steps=10_000)
        self.model = contestant.model.train()
        self.optimizer = contestant.optimizer(lr=1e-4, weight_decay=0.0)
        if name.startswith("spiel"):
            self.reselector = spiel.Reselector(self.model, self.optimizer, total_steps=10_000)

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

    def __init__(self, names):
        self.runners = {name: Runner(name) for name in names}
        self.seconds = {name: [] for name in names}

    def round(self, timed=True):
        for name, runner in self.runners.items():
            start = time.perf_counter()
            runner.step()
            if timed:
                self.seconds[name].append(time.perf_counter() - start)

    def ratio(self, name, base):
        """Median over rounds of the ratio to `base` in the same round."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return statistics.median(own / other for own, other in pairs)


@pytest.fixture(scope="session")
def race():
    names = ("frozen", "full", "lora", "shira", "spiel", "spiel-ma")
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # the other tests have one
    race = Race(names)
    for _ in range(WARM_UP):
        race.round(timed=False)
    return race
