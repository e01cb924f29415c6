"""Training data: JSONL rows -> tokenised examples with the prompt masked -> batches."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from suites.suite import DataSource

#: A label that the loss leaves out (torch's and transformers' convention).
IGNORED = -100

FIELDS = ("prompt", "completion")

#: `input_ids` and `labels`: lists of token ids, equally long; labels of the prompt are IGNORED.
Example = dict[str, list[int]]


@dataclass(frozen=True)
class Examples(Sequence[Example]):
    """The tokenised examples of one source, in its order, and what was left out of them."""

    items: tuple[Example, ...]
    #: Rows whose completion lay wholly beyond max_length, so that nothing was left to learn.
    num_dropped: int
    #: Rows that were cut at max_length and kept.
    num_truncated: int

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    @property
    def num_tokens(self) -> int:
        return sum(len(example["input_ids"]) for example in self.items)

    @property
    def num_target_tokens(self) -> int:
        return sum(label != IGNORED for example in self.items for label in example["labels"])


def load_examples(source: DataSource, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """Reads and tokenises `source`: prompt, completion and EOS, cut at `source.max_length` tokens.

    Raises ValueError for a file that is missing, empty or broken, naming the line, and for one of
    which max_length leaves nothing.
    """
    rows = list(read_rows(Path(source.path)))
    if not rows:
        raise ValueError(f"{source.path} has no rows, at least one is needed")
    examples = list(_tokenise(rows, tokenizer))
    cut = [
        {name: ids[: source.max_length] for name, ids in example.items()} for example in examples
    ]
    kept = [
        index
        for index, example in enumerate(cut)
        if any(label != IGNORED for label in example["labels"])
    ]
    if not kept:
        raise ValueError(
            f"{source.path}: max_length {source.max_length} cuts off every completion; "
            f"the longest row has {max(len(e['input_ids']) for e in examples)} tokens"
        )
    return Examples(
        items=tuple(cut[index] for index in kept),
        num_dropped=len(cut) - len(kept),
        num_truncated=sum(
            len(cut[index]["labels"]) < len(examples[index]["labels"]) for index in kept
        ),
    )


def read_rows(path: Path) -> Iterator[Mapping[str, str]]:
    """The rows of a JSONL file, checked one by one; empty lines are skipped."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file; JSONL with {' and '.join(FIELDS)} is needed")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _row(line, f"{path}, line {number}")


def _row(line: str, where: str) -> Mapping[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: broken JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a JSON object is needed, got {type(row).__name__}")
    for name in FIELDS:
        if name not in row:
            raise ValueError(
                f"{where}: field {name!r} is missing; needed: {', '.join(FIELDS)}; "
                f"there: {', '.join(row) or 'none'}"
            )
        if not isinstance(row[name], str):
            raise ValueError(
                f"{where}: field {name!r} must be a string, got {type(row[name]).__name__}"
            )
    return row


def _tokenise(
    rows: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Example]:
    """Examples of full length.

    Prompt and completion are tokenised as one string, as lm-eval does, so that a word at their
    seam gets the tokens it will get at test time. A token that spans the seam is learnt.
    """
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    wholes = tokenizer([row["prompt"] + row["completion"] for row in rows])["input_ids"]
    for prompt, whole in zip(prompts, wholes, strict=True):
        masked = _common_prefix(prompt, whole)
        ids = whole if whole[-1:] == [tokenizer.eos_token_id] else [*whole, tokenizer.eos_token_id]
        yield {"input_ids": ids, "labels": [IGNORED] * masked + ids[masked:]}


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))


@dataclass(frozen=True)
class Collator:
    """Examples -> one batch, padded on the right to its longest."""

    pad_token_id: int

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """`input_ids`, `attention_mask` and `labels`, each (examples, longest) and int64."""
        import torch

        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([row + [filler] * (longest - len(row)) for row in rows])

        ids = [example["input_ids"] for example in examples]
        return {
            "input_ids": padded(ids, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], 0),
            "labels": padded([example["labels"] for example in examples], IGNORED),
        }
