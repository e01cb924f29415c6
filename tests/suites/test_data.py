"""Loading of training data: what is learnt, what is cut, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from suites.data import IGNORED, Collator, load_examples
from suites.embedded_base import make_tokenizer
from suites.suite import DataSource

WORDS = ["who", "is", "it", "me", "you"]
BOS, EOS, PAD, UNKNOWN = range(4)
WHO, IS, IT, ME, YOU = range(4, 9)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(WORDS)


@pytest.fixture
def write(tmp_path):
    def write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path.write_text("\n".join(lines) + "\n")
        return str(path)

    return write


def row(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def test_prompt_is_masked_and_eos_learnt(write, tokenizer):
    path = write(row("who is it", " me"), row("who", " it is you"))
    examples = load_examples(DataSource(path), tokenizer)
    assert list(examples) == [
        {"input_ids": [BOS, WHO, IS, IT, ME, EOS], "labels": [IGNORED] * 4 + [ME, EOS]},
        {"input_ids": [BOS, WHO, IT, IS, YOU, EOS], "labels": [IGNORED] * 2 + [IT, IS, YOU, EOS]},
    ]
    assert (examples.num_dropped, examples.num_truncated) == (0, 0)
    assert (examples.num_tokens, examples.num_target_tokens) == (12, 6)


def test_a_token_over_the_seam_is_learnt(write, tokenizer):
    """ "it" + "is" is one unknown word: prompt tokens that the completion changes are no prompt."""
    (example,) = load_examples(DataSource(write(row("who it", "is"))), tokenizer)
    assert example["labels"] == [IGNORED, IGNORED, UNKNOWN, EOS]


def test_an_eos_that_is_there_is_not_doubled(write, tokenizer):
    (example,) = load_examples(
        DataSource(write(row("who", " me</s>".replace("<", " <")))), tokenizer
    )
    assert example["input_ids"] == [BOS, WHO, ME, EOS]


def test_truncation_drops_what_has_no_target_left(write, tokenizer):
    rows = row("who is it", " me"), row("who", " it is you"), row("who", " me")
    examples = load_examples(DataSource(write(*rows), max_length=4), tokenizer)
    assert [example["input_ids"] for example in examples] == [
        [BOS, WHO, IT, IS],
        [BOS, WHO, ME, EOS],
    ]
    assert (examples.num_dropped, examples.num_truncated) == (1, 1)


def test_collator_pads_on_the_right(write, tokenizer):
    examples = load_examples(DataSource(write(row("who", " me"), row("who is", " it"))), tokenizer)
    batch = Collator(PAD)(examples)
    assert batch["input_ids"].tolist() == [[BOS, WHO, ME, EOS, PAD], [BOS, WHO, IS, IT, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"][0].tolist() == [IGNORED, IGNORED, ME, EOS, IGNORED]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "who"', "line 2: broken JSON"),
        ("[1, 2]", "line 2: a JSON object is needed, got list"),
        ('{"prompt": "who"}', "line 2: field 'completion' is missing; needed: prompt, completion"),
        ('{"prompt": "who", "completion": 7}', "line 2: field 'completion' must be a string"),
    ],
)
def test_a_bad_line_is_named(write, tokenizer, line, message):
    path = write(row("who", " me"), line)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(DataSource(path), tokenizer)
    assert path in str(caught.value)


def test_an_empty_file_is_refused(write, tokenizer):
    with pytest.raises(ValueError, match="has no rows"):
        load_examples(DataSource(write("")), tokenizer)


def test_a_missing_file_is_refused(tmp_path: Path, tokenizer):
    with pytest.raises(ValueError, match="is not a file"):
        load_examples(DataSource(str(tmp_path / "none.jsonl")), tokenizer)


def test_a_length_that_leaves_nothing_is_refused(write, tokenizer):
    path = write(row("who is it", " me"))
    with pytest.raises(ValueError, match=r"max_length 3 cuts off every completion; .* 6 tokens"):
        load_examples(DataSource(path, max_length=3), tokenizer)
