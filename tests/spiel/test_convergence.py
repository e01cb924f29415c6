"""SpIEL learns what LoRA learns with as many trainable weights."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import spiel

STEPS = 150
#: Sentences whose next token is always the last one plus three.
INPUT_IDS = torch.stack([(torch.arange(8) * 3 + first) % 40 for first in range(40)])


def small_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def final_loss(model, optimizer, reselector=None):
    model.train()
    for _ in range(STEPS):
        loss = model(input_ids=INPUT_IDS, labels=INPUT_IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if reselector is not None:
            reselector.step()
    return loss.item()


@pytest.fixture(scope="module")
def lora():
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(small_llama(), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    num_trainable = sum(p.numel() for p in parameters)
    return num_trainable, final_loss(model, torch.optim.AdamW(parameters, lr=0.02))


@pytest.mark.parametrize(
    ("growth", "optimizer", "values"),
    [
        ("ag", spiel.SpielAdamW, {"lr": 0.02}),
        ("ag", spiel.SpielAdamW, {"lr": 0.02, "state_dtype": "bfloat16"}),
        ("ag", spiel.SpielAdamW, {"lr": 0.02, "state_dtype": "8bit"}),
        ("ma", spiel.SpielSM3, {"lr": 0.3}),
    ],
)
def test_it_learns_what_lora_learns(lora, growth, optimizer, values):
    num_trainable, lora_loss = lora
    config = spiel.SpielConfig(growth=growth, num_tunable_weights=num_trainable)
    model = peft.get_peft_model(small_llama(), config)
    optimizer = optimizer(model, **values)
    loss = final_loss(model, optimizer, spiel.Reselector(model, optimizer, STEPS))
    assert lora_loss < 1.2  # it starts at 3.9; the first token cannot be known
    assert loss < lora_loss + 0.1
