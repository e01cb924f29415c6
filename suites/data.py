"""Training data: rows -> tokenised examples with the prompt masked -> batches."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from suites.formats import Text, texts
from suites.rows import read_rows
from suites.sources import RANDOM_TOKENS, DataSource
from suites.values import given

#: A label that the loss leaves out (torch's and transformers' convention).
IGNORED = -100

#: Texts tokenised at once: enough to keep every core busy, few enough to be held in memory.
BATCH = 1000

#: `input_ids` and `labels`: lists of token ids, equally long; labels of the prompt are IGNORED.
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Tokens:
    """One example, held in a tenth of the memory that lists take."""

    #: int32, (length,)
    ids: np.ndarray
    #: [start, end) in tokens, of what is learnt.
    targets: tuple[tuple[int, int], ...]

    def example(self) -> Example:
        ids = self.ids.tolist()
        labels = [IGNORED] * len(ids)
        for start, end in self.targets:
            labels[start:end] = ids[start:end]
        return {"input_ids": ids, "labels": labels}

    def cut(self, length: int) -> Tokens:
        """The first `length` tokens, and the targets that lie in them."""
        targets = ((start, min(end, length)) for start, end in self.targets if start < length)
        return Tokens(self.ids[:length], tuple(targets))


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The tokenised examples of one source, in its order, and what was left out of them."""

    tokens: tuple[Tokens, ...]
    #: Rows in which nothing was to be learnt, as it lay beyond max_length or was never there, and
    #: rows of more than max_characters.
    num_dropped: int
    #: Rows that were cut at max_length and kept.
    num_truncated: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def hash(self) -> str:
        """Of all tokens, and of which are learnt."""
        found = hashlib.sha256()
        for tokens in self.tokens:
            found.update(tokens.ids.tobytes())
            found.update(repr(tokens.targets).encode())
        return found.hexdigest()[:12]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [tokens.example() for tokens in self.tokens[index]]
        return self.tokens[index].example()


def load_examples(
    source: DataSource, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int | None = None
) -> Examples:
    """Reads and tokenises `source`, cut at `source.max_length` tokens.

    `vocab_size` is needed for RANDOM_TOKENS alone, which need no tokenizer. Raises ValueError for
    a source that is missing, empty or broken, naming the line, and for one of which nothing is
    left to learn.
    """
    if source.path == RANDOM_TOKENS:
        return random_examples(source, vocab_size)
    if tokenizer is None:
        raise ValueError(f"data {source.path} need a model with a tokenizer, not only a shape")
    found = texts(read_rows(source), source, tokenizer)
    limit = source.max_characters
    short = [text for text in found if limit is None or len(text.text) <= limit]
    kept, num_truncated, longest = [], 0, 0
    for tokens in tokenise(short, tokenizer):
        longest = max(longest, len(tokens.ids))
        cut = tokens.cut(source.max_length)
        if cut.targets:
            kept.append(cut)
            num_truncated += len(tokens.ids) > source.max_length
    if not kept:
        why = "none has anything to learn"
        if longest > source.max_length:
            why = f"max_length {source.max_length} cuts off every completion"
        raise ValueError(
            f"{source.path}: all {len(found)} rows are dropped: {why}; "
            f"the longest has {longest} tokens"
        )
    return Examples(tuple(kept), len(found) - len(kept), num_truncated)


def random_examples(source: DataSource, vocab_size: int | None) -> Examples:
    """`num_examples` rows of `max_length` random ids, all learnt; the same for the same source."""
    if vocab_size is None:
        raise ValueError("random tokens need the model's vocab_size")
    ids = np.random.default_rng(source.choice_seed).integers(
        vocab_size, size=(given(source.num_examples), source.max_length), dtype=np.int32
    )
    return Examples(tuple(Tokens(row, ((0, source.max_length),)) for row in ids), 0)


def tokenise(found: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    """Every text at full length.

    A text is tokenised whole, as lm-eval does, so that a word at the seam of prompt and
    completion gets the tokens it will get at test time. A token that spans the seam is learnt.
    """
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token
    for first in range(0, len(found), BATCH):
        batch = found[first : first + BATCH]
        # A chat template may write the BOS itself; a second one would be wrong.
        marked = [bos is not None and text.text.startswith(bos) for text in batch]
        encoded = {
            has_bos: _encode(
                [text.text for text, has in zip(batch, marked, strict=True) if has == has_bos],
                tokenizer,
                add_special_tokens=not has_bos,
            )
            for has_bos in set(marked)
        }
        for text, has_bos in zip(batch, marked, strict=True):
            ids, place = next(encoded[has_bos])
            targets = [(place(start), place(end, after=True)) for start, end in text.targets]
            if text.ends and targets:
                ids = ids if ids[-1] == eos else [*ids, eos]
                targets[-1] = (targets[-1][0], len(ids))
            spans = tuple((start, end) for start, end in targets if start < end)
            yield Tokens(np.array(ids, dtype=np.int32), spans)


def _encode(
    batch: Sequence[str], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> Iterator[tuple[list[int], Any]]:
    """Ids of each text, and a function from its characters to the tokens that hold them."""
    encoded = tokenizer(list(batch), add_special_tokens=add_special_tokens)
    for index, text in enumerate(batch):
        ids = encoded["input_ids"][index]
        if encoded.is_fast:
            yield ids, _Places(text, encoded.encodings[index])
        else:
            yield ids, _SlowPlaces(text, ids, tokenizer)


@dataclass(frozen=True)
class _Places:
    """Finds the token of a character by the offsets that fast tokenizers keep."""

    text: str
    encoding: Any

    def __call__(self, position: int, after: bool = False) -> int:
        """The first token that holds `text[position:]`; with `after`, none of what is before."""
        for place in range(position, len(self.text)):
            token = self.encoding.char_to_token(place)
            if token is not None:
                spans = after and self.encoding.token_to_chars(token)[0] < position
                return token + 1 if spans else token
        of_text = [i for i, of in enumerate(self.encoding.sequence_ids) if of is not None]
        return of_text[-1] + 1 if of_text else 0


@dataclass(frozen=True)
class _SlowPlaces:
    """Finds the token of a character by tokenising what is before it."""

    text: str
    ids: list[int]
    tokenizer: PreTrainedTokenizerBase

    def __call__(self, position: int, after: bool = False) -> int:
        """As for `_Places`."""
        before = self.tokenizer(self.text[:position], add_special_tokens=False)["input_ids"]
        if self.ids[:1] == [self.tokenizer.bos_token_id] != before[:1]:
            before = [self.tokenizer.bos_token_id, *before]
        for index, (left, right) in enumerate(zip(before, self.ids, strict=False)):
            if left != right:
                return index + 1 if after else index
        return len(before)


@dataclass(frozen=True)
class Collator:
    """Examples -> one batch, padded to its longest.

    Padding is never learnt nor attended to. It is on the right, so that positions count from the
    first token also for models that take them as absolute.
    """

    pad_token_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase | None) -> Collator:
        """Pads with the tokenizer's padding; where there is none all rows are equally long."""
        return cls(0 if tokenizer is None else tokenizer.pad_token_id)

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (examples, longest) and int64."""
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }
