"""Prefix tuning (arXiv 2101.00190) as peft ships it, begun where the model can still be heard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import initialize_kv_prefix_from_past_key_values
from transformers import PreTrainedModel

from baselines.adapter import Adapter
from baselines.contestant import AdamWContestant

PREFIX = Adapter("prefix", "PREFIX_TUNING", knob="num_virtual_tokens")


@dataclass(frozen=True)
class Prefix:
    """Keys and values of virtual tokens; their number is solved from the budget.

    They begin as the model's own for random tokens of its vocabulary, if `activations`, which the
    paper (section 7.4) finds far better than peft's default, normal deviates.
    """

    activations: bool

    def prepare(self, model: PreTrainedModel, budget: Any, total_steps: int) -> AdamWContestant:
        contestant = PREFIX.prepare(model, budget, total_steps)
        if self.activations:
            initialize(contestant.model)
        return contestant

    def size(self, model: PreTrainedModel, budget: Any) -> int:
        return PREFIX.size(model, budget)


@torch.no_grad()
def initialize(adapted: Any) -> torch.Tensor:
    """Sets the prefix to what random tokens leave in the cache; returns the tokens, (1, n)."""
    num_tokens = adapted.active_peft_config.num_virtual_tokens
    vocabulary = adapted.config.get_text_config().vocab_size
    tokens = torch.randint(vocabulary, (1, num_tokens)).to(adapted.device)
    with adapted.disable_adapter():
        cache = adapted(input_ids=tokens, use_cache=True).past_key_values
    keys_and_values = [(layer.keys, layer.values) for layer in cache.layers]
    initialize_kv_prefix_from_past_key_values(adapted, past_key_values=keys_and_values)
    return tokens
