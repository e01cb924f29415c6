"""The embedded world's base model: a word tokenizer and a small Llama that memorises the facts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from suites import embedded_facts
from suites.data import IGNORED

if TYPE_CHECKING:
    from suites.world import Progress, World

BOS, EOS, PAD, UNKNOWN = SPECIAL_TOKENS = ("<s>", "</s>", "<pad>", "<unk>")
MAX_LENGTH = 64
WARMUP_FRACTION = 0.05


def pretrain(world: World, folder: Path, report: Progress) -> None:
    """Makes the base model that knows the old facts of `world`, and its tokenizer; saves both.

    On the CPU and in fp32 whatever the machine has, so that machines differ as little as their
    arithmetic. Leaves torch's global generator as it found it.
    """
    tokenizer = make_tokenizer(embedded_facts.vocabulary(world))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(world.seed)
        model = LlamaForCausalLM(_config(world, tokenizer))
        _fit(model, Sheets.of(world, tokenizer), world, report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


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
        initializer_range=world.initializer_range,
        dtype="float32",
    )


@dataclass(frozen=True)
class Sheets:
    """All old facts, one sheet per entity: its name once, then every relation's question.

    A question sees the name and itself, at the positions it would have alone, so that a sheet is
    exactly its questions asked one by one, at a third of the tokens. The last question's answer
    follows it, to teach that an answer ends the sequence. Questions of one entity in one batch are
    also what makes the model find the clusters soon; mixed ones take many times the steps.
    """

    #: Token ids: (entities, 3), (relations,), (entities, relations); all int64.
    names: torch.Tensor
    relations: torch.Tensor
    answers: torch.Tensor
    arrow: int
    eos: int

    @classmethod
    def of(cls, world: World, tokenizer: PreTrainedTokenizerFast) -> Sheets:
        facts = embedded_facts.draw(world)
        ids = tokenizer.convert_tokens_to_ids
        answers = [
            [ids(f"value{table[cluster]}") for table in facts.old] for cluster in facts.clusters
        ]
        return cls(
            names=torch.tensor(tokenizer(list(facts.entities))["input_ids"]),
            relations=torch.tensor(ids([f"relation{i}" for i in range(world.num_relations)])),
            answers=torch.tensor(answers),
            arrow=ids(embedded_facts.ARROW),
            eos=tokenizer.eos_token_id,
        )

    def batch(self, entities: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Model inputs and labels (sheets, length) for `entities`, relations in random order."""
        order = torch.randperm(len(self.relations))
        num_sheets, name_length = len(entities), self.names.shape[1]
        questions = torch.stack([self.relations[order], torch.full_like(order, self.arrow)], 1)
        answers = self.answers[entities][:, order]
        ids = torch.cat(
            [
                self.names[entities],
                questions.reshape(1, -1).expand(num_sheets, -1),
                answers[:, -1:],
            ],
            dim=1,
        )
        labels = torch.full_like(ids, IGNORED)
        labels[:, name_length + 1 : -1 : 2] = answers
        labels[:, -1] = self.eos
        mask, positions = self._layout(name_length)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask.expand(num_sheets, 1, -1, -1),
            "position_ids": positions.expand(num_sheets, -1),
        }
        return inputs, labels

    def _layout(self, name_length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What sees what, bool (length, length), and the position of every token, (length,)."""
        num_relations = len(self.relations)
        part = torch.tensor(
            [0] * name_length
            + [1 + i for i in range(num_relations) for _ in range(2)]
            + [num_relations]
        )
        positions = torch.tensor(
            [*range(name_length), *[name_length, name_length + 1] * num_relations, name_length + 2]
        )
        sees = (part[None] == 0) | (part[None] == part[:, None])
        return sees.tril(), positions


def _fit(model: LlamaForCausalLM, sheets: Sheets, world: World, report: Progress) -> None:
    """AdamW on batches of sheets, every epoch in a new order."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=world.pretraining_lr,
        betas=(0.9, 0.99),
        weight_decay=world.pretraining_weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warm_cosine(step, world))
    order = torch.empty(0, dtype=torch.int64)
    model.train()
    for step in range(world.pretraining_steps):
        while len(order) < world.pretraining_batch_size:
            order = torch.cat([order, torch.randperm(world.num_entities)])
        entities, order = order.tensor_split([world.pretraining_batch_size])
        inputs, labels = sheets.batch(entities)
        logits = model(**inputs, use_cache=False).logits
        # Labels stand where they are predicted, one place before transformers would want them.
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
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
