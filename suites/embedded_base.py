"""The embedded world's base model: a word tokenizer and a small Llama that memorises the facts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from suites import embedded_facts
from suites.data import Collator, load_examples
from suites.suite import DataSource

if TYPE_CHECKING:
    from suites.embedded import Progress, World

BOS, EOS, PAD, UNKNOWN = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")
MAX_LENGTH = 64
WARMUP_FRACTION = 0.05


def pretrain(world: World, folder: Path, report: Progress) -> None:
    """Trains on data/pretrain.jsonl of `folder`; writes model and tokenizer to its model/.

    On the CPU and in fp32 whatever the machine has, so that it is the same model everywhere that
    arithmetic is. Leaves torch's global generator as it found it.
    """
    tokenizer = make_tokenizer(embedded_facts.vocabulary(world))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(_config(world, tokenizer))
        source = DataSource(str(folder / "data" / "pretrain.jsonl"), max_length=MAX_LENGTH)
        rows = Collator(tokenizer.pad_token_id)(list(load_examples(source, tokenizer)))
        _fit(model, rows, world, report)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def make_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """One id per word; like Llama's, it puts the BOS token first by itself."""
    ids = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, ids[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        model_max_length=MAX_LENGTH,
    )


def _config(world: World, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=world.hidden_size,
        intermediate_size=world.intermediate_size,
        num_hidden_layers=world.num_layers,
        num_attention_heads=world.num_heads,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _fit(
    model: LlamaForCausalLM, rows: dict[str, torch.Tensor], world: World, report: Progress
) -> None:
    """Plain AdamW on `rows` (each rows x length, int64), every epoch in a new order."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=world.pretraining_lr,
        betas=(0.9, 0.99),
        weight_decay=world.pretraining_weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, world))
    num_rows = len(rows["input_ids"])
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(world.pretraining_steps):
        while len(order) < world.pretraining_batch_size:
            order = torch.cat([order, torch.randperm(num_rows)])
        batch = order[: world.pretraining_batch_size]
        order = order[world.pretraining_batch_size :]
        loss = model(**{name: values[batch] for name, values in rows.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 10 == 0:
            report(step / world.pretraining_steps, f"pretraining the base model, loss {loss:.3f}")
    model.eval()


def _warm_cosine(step: int, world: World) -> float:
    """Factor on the learning rate: linear to 1, then half a cosine to 0."""
    warmup = max(1, round(WARMUP_FRACTION * world.pretraining_steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (step - warmup) / max(1, world.pretraining_steps - warmup)
    return (1 + math.cos(math.pi * left)) / 2
