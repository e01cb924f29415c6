"""SpIEL reproduces traces that were recorded from the code of its authors, in fp32 on a CPU."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import spiel

GOLDEN = Path(__file__).parent / "golden"


class Trace:
    """A recorded run: initial weights and supports, batches, losses, supports at some steps."""

    def __init__(self, name):
        self.file = safe_open(GOLDEN / f"{name}.safetensors", "pt")
        self.meta = self.file.metadata()

    def number(self, name):
        return json.loads(self.meta[name])

    def tensors(self, prefix):
        names = [key for key in self.file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): self.file.get_tensor(name) for name in names}

    def model(self):
        config = LlamaConfig(**self.number("model"), attn_implementation="eager")
        base = LlamaForCausalLM(config)
        base.load_state_dict(self.tensors("weight/"))
        support = self.tensors("init_indices/")
        spiel_config = spiel.SpielConfig(
            growth=self.meta["selection_algorithm"],
            num_deltas={name: len(indices) for name, indices in support.items()},
            target_modules="all-linear",
            reselection_steps=self.number("reselection_steps"),
            selection_accumulation_steps=self.number("selection_accumulation_steps"),
            initial_reselection_rate=self.number("initial_reselection_rate"),
            reselection_rate_policy=self.meta["reselection_rate_policy"],
        )
        model = peft.get_peft_model(base, spiel_config).train()
        spiel.set_support(model, support)
        return model

    def optimizer(self, model):
        values = {name: self.number(name) for name in ("eps", "weight_decay")}
        lr = self.number("learning_rate")
        if self.meta["selection_algorithm"] == "sm3":
            return spiel.SpielSM3(model, lr=lr, **values)
        return spiel.SpielAdamW(model, lr=lr, betas=self.number("betas"), **values)


def assert_deltas_equal(model, trace, step):
    for name, (indices, values) in spiel.get_deltas(model).items():
        expected = trace.tensors(f"step{step:04d}/indices/{name}")[""]
        assert torch.equal(indices.long(), expected), f"support of {name} after step {step}"
        expected = trace.tensors(f"step{step:04d}/values/{name}")[""]
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["ag_linear", "ag_cosine_wd", "ma_linear"])
def test_trace_is_reproduced(name):
    trace = Trace(name)
    model = trace.model()
    optimizer = trace.optimizer(model)
    accumulation, steps = trace.number("gradient_accumulation_steps"), trace.number("steps")
    reselector = spiel.Reselector(model, optimizer, steps)
    batches = trace.tensors("input_ids")[""].split(accumulation)
    losses = []
    for step, micro_batches in enumerate(batches, start=1):
        for input_ids in micro_batches:
            loss = model(input_ids=input_ids, labels=input_ids).loss
            losses.append(loss.detach())
            (loss / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        reselector.step()
        if step in trace.number("marks"):
            assert_deltas_equal(model, trace, step)
    torch.testing.assert_close(torch.stack(losses), trace.tensors("loss")[""], rtol=0, atol=1e-5)
