"""A Llama small enough for tests, with fewer heads for keys than for queries."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from suites.catalog import LLAMA_PROJECTIONS
from suites.suite import Budget

BATCH = {
    "input_ids": torch.arange(24).reshape(4, 6),
    "labels": torch.arange(24).reshape(4, 6),
}


def make_llama(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def budget(text="r4"):
    return Budget.parse(text, LLAMA_PROJECTIONS)


def logits(model):
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"]).logits


def train(contestant, lr=1e-2, steps=6):
    """The losses of plain steps without callbacks."""
    contestant.model.train()
    optimizer = contestant.optimizer(lr=lr, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = contestant.model(**BATCH).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    contestant.model.eval()
    return losses
