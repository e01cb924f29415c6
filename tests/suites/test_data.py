"""Loading of training data: what is learnt, what is cut, what is refused."""

import json
import time
from pathlib import Path

import pyarrow
import pytest
import torch
from datasets import Dataset
from pyarrow import parquet
from transformers import ByT5Tokenizer

from suites.data import IGNORED, Collator, load_examples
from suites.embedded_base import make_tokenizer
from suites.suite import DataSource
from tests.suites import hub_files

WORDS = ["who", "is", "it", "me", "you"]
BOS, EOS, PAD, UNKNOWN = range(4)
WHO, IS, IT, ME, YOU = range(4, 9)
N = IGNORED


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
        {"input_ids": [BOS, WHO, IS, IT, ME, EOS], "labels": [N, N, N, N, ME, EOS]},
        {"input_ids": [BOS, WHO, IT, IS, YOU, EOS], "labels": [N, N, IT, IS, YOU, EOS]},
    ]
    assert examples.num_dropped == 0


def test_a_prompt_is_learnt_if_asked_for(write, tokenizer):
    (example,) = load_examples(DataSource(write(row("who", " me")), mask_prompt=False), tokenizer)
    assert example["labels"] == [N, WHO, ME, EOS]


def test_a_token_over_the_seam_is_learnt(write, tokenizer):
    """ "it" + "is" is one unknown word: prompt tokens that the completion changes are no prompt."""
    (example,) = load_examples(DataSource(write(row("who it", "is"))), tokenizer)
    assert example["labels"] == [N, N, UNKNOWN, EOS]


def test_an_eos_that_is_there_is_not_doubled(write, tokenizer):
    (example,) = load_examples(DataSource(write(row("who", " me </s>"))), tokenizer)
    assert example["input_ids"] == [BOS, WHO, ME, EOS]
    assert example["labels"] == [N, N, ME, EOS]


def test_truncation_drops_what_has_no_target_left(write, tokenizer):
    rows = row("who is it", " me"), row("who", " it is you"), row("who", " me")
    examples = load_examples(DataSource(write(*rows), max_length=4), tokenizer)
    assert list(examples) == [
        {"input_ids": [BOS, WHO, IT, IS], "labels": [N, N, IT, IS]},
        {"input_ids": [BOS, WHO, ME, EOS], "labels": [N, N, ME, EOS]},
    ]
    assert (examples.num_dropped, examples.num_truncated) == (1, 1)


def test_rows_without_a_target_and_too_long_ones_are_dropped_and_counted(write, tokenizer):
    rows = row("who", ""), row("who", " me"), row("who is it", " me you")
    examples = load_examples(DataSource(write(*rows), max_characters=10), tokenizer)
    assert [example["input_ids"] for example in examples] == [[BOS, WHO, ME, EOS]]
    assert examples.num_dropped == 2


def test_templates_name_columns_of_any_name(write, tokenizer):
    rows = (
        {"q": "who", "more": "is it", "a": "me", "else": 1},
        {"q": "who", "more": "", "a": "you"},
    )
    source = DataSource(write(*rows), prompt="{q}\n{more}\nit", completion=" {a}")
    first, second = load_examples(source, tokenizer)
    assert first["input_ids"] == [BOS, WHO, IS, IT, IT, ME, EOS]
    assert second == {"input_ids": [BOS, WHO, IT, YOU, EOS], "labels": [N, N, N, YOU, EOS]}


@pytest.mark.parametrize("template", ["{}", "{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{a"])
def test_templates_are_columns_and_nothing_else(template):
    with pytest.raises(ValueError, match="template"):
        DataSource("d", prompt=template)


def test_plain_data_may_replace_data_with_templates(write, tokenizer):
    """As `--data` does for a suite whose own data has columns of other names."""
    source = DataSource(write(row("who", " me")), prompt="is {query}", completion="{response}")
    (example,) = load_examples(source, tokenizer)
    assert example["input_ids"] == [BOS, WHO, ME, EOS]


def test_collator_pads_on_the_right(write, tokenizer):
    examples = load_examples(DataSource(write(row("who", " me"), row("who is", " it"))), tokenizer)
    batch = Collator(PAD)(examples)
    assert batch["input_ids"].tolist() == [[BOS, WHO, ME, EOS, PAD], [BOS, WHO, IS, IT, EOS]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["labels"].tolist() == [[N, N, ME, EOS, N], [N, N, N, IT, EOS]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_eos_is_learnt_where_it_also_pads(write):
    tokenizer = make_tokenizer(WORDS)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "left"  # which we do not follow
    examples = load_examples(DataSource(write(row("who", " me"), row("who is", " it"))), tokenizer)
    assert Collator.of(tokenizer)(examples)["labels"][0].tolist() == [N, N, ME, EOS, N]


def test_parquet_and_folders_are_read_like_lines(write, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [row("who", " me"), row("who is", " it")]
    expected = list(load_examples(DataSource(write(*rows)), tokenizer))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert list(load_examples(DataSource(str(tmp_path / "rows.parquet")), tokenizer)) == expected
    folder = hub_files.write_repository(tmp_path, "some/data", {"default": {"train": rows}})
    assert list(load_examples(DataSource(str(folder)), tokenizer)) == expected


def test_a_choice_is_seeded_and_in_order(write, tokenizer):
    path = write(*(row("who " * i, " me") for i in range(1, 21)))

    def lengths(**choice):
        examples = load_examples(DataSource(path, **choice), tokenizer)
        return [len(example["labels"]) for example in examples]

    some = lengths(num_examples=5)
    assert len(some) == 5
    assert some == sorted(some) == lengths(num_examples=5)
    assert some != lengths(num_examples=5, choice_seed=1)
    assert lengths(num_examples=100) == lengths()


def test_a_tokenizer_without_offsets_masks_alike(write):
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    (example,) = load_examples(DataSource(write(row("ab", "cd"))), tokenizer)
    assert example["input_ids"] == [*(byte + 3 for byte in b"abcd"), tokenizer.eos_token_id]
    assert example["labels"] == [N, N, *example["input_ids"][2:]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "who"', "line 2: broken JSON"),
        ("[1, 2]", "line 2: a JSON object is needed, got list"),
        (r'{"prompt": "\ud800", "completion": "b"}', "line 2: it has half a surrogate pair"),
        ('{"prompt": "who"}', "line 2: field 'completion' is missing; needed: prompt, completion"),
        ('{"prompt": "who", "completion": 7}', "line 2: field 'completion' must be a string"),
    ],
)
def test_a_bad_line_is_named(write, tokenizer, line, message):
    path = write(row("who", " me"), line)
    with pytest.raises(ValueError, match=message) as caught:
        load_examples(DataSource(path), tokenizer)
    assert path in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(row("who", " me")).encode() + b'\n{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        load_examples(DataSource(str(path)), tokenizer)


def test_missing_columns_name_what_is_allowed(write, tokenizer):
    source = DataSource(write({"query": "who", "answer": "me"}), prompt="{query}", completion="{r}")
    message = "needed: query and r, or messages, or prompt and completion; there: query, answer"
    with pytest.raises(ValueError, match=message):
        load_examples(source, tokenizer)


def test_an_empty_file_is_refused(write, tokenizer):
    with pytest.raises(ValueError, match="has no rows"):
        load_examples(DataSource(write("")), tokenizer)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "not a file"), ("rows.csv", "ends in no known way"), ("a/b/c", "not a file")],
)
def test_a_path_to_nothing_is_refused(tmp_path: Path, tokenizer, name, message):
    (tmp_path / "rows.csv").write_text("prompt,completion\n")
    with pytest.raises(ValueError, match=rf"{message}; needed: a \.jsonl, \.json, \.parquet file"):
        load_examples(DataSource(str(tmp_path / name)), tokenizer)


def test_a_broken_parquet_is_refused(tmp_path, tokenizer):
    (tmp_path / "rows.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        load_examples(DataSource(str(tmp_path / "rows.parquet")), tokenizer)


def test_a_hub_id_out_of_reach_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"data some-owner/some-data .*; --data takes the path"):
        load_examples(DataSource("some-owner/some-data"), tokenizer)


def test_a_length_that_leaves_nothing_is_refused(write, tokenizer):
    path = write(row("who is it", " me"))
    with pytest.raises(ValueError, match=r"max_length 3 cuts off every completion; .* 6 tokens"):
        load_examples(DataSource(path, max_length=3), tokenizer)


def test_random_tokens_are_the_same_for_the_same_source():
    source = DataSource("{random tokens}", max_length=6, num_examples=3)
    examples = load_examples(source, None, vocab_size=10)
    assert list(examples) == list(load_examples(source, None, vocab_size=10))
    assert all(example["labels"] == example["input_ids"] for example in examples)
    assert [len(example["input_ids"]) for example in examples] == [6, 6, 6]
    with pytest.raises(ValueError, match="random tokens need num_examples"):
        DataSource("{random tokens}")


def test_long_data_load_at_a_million_tokens_in_seconds(tmp_path):
    """50,000 examples of 2048 tokens are a hundred times this."""
    text = "word " * 400
    path = hub_files.write_jsonl(tmp_path / "long.jsonl", [row("ask", text)] * 500)
    started = time.monotonic()
    examples = load_examples(DataSource(str(path)), hub_files.byte_tokenizer())
    assert time.monotonic() - started < 10
    assert [tokens.ids.nbytes for tokens in examples.tokens] == [4 * (5 + 2000)] * 500


def test_data_of_the_hub_are_of_the_revision_asked_for(tokenizer, monkeypatch):
    asked = []

    def load_dataset(path, **options):
        asked.append((path, options["revision"]))
        return Dataset.from_list([row("who is it", " me")])

    monkeypatch.setattr("suites.hub.stay_offline_if_unreachable", lambda: None)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for revision in (None, "abc"):
        load_examples(DataSource("me/rows", revision=revision), tokenizer)
    assert asked == [("me/rows", None), ("me/rows", "abc")]


@pytest.mark.parametrize("subset", ["one", "two"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_subset_and_the_split_that_are_named_are_read(
    tokenizer, tmp_path, monkeypatch, subset, split
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = {
        name: {part: [row("who", f" {word}")] for part, word in words.items()}
        for name, words in {
            "one": {"train": "me", "test": "you"},
            "two": {"train": "it", "test": "is"},
        }.items()
    }
    folder = hub_files.write_repository(tmp_path, "some/data", rows)
    (example,) = load_examples(DataSource(str(folder), subset=subset, split=split), tokenizer)
    (expected,) = rows[subset][split]
    assert tokenizer.decode(example["input_ids"][-2:-1]).strip() == expected["completion"].strip()


def test_an_empty_line_counts_where_a_bad_one_is_named(write, tokenizer):
    with pytest.raises(ValueError, match="line 3: broken JSON"):
        load_examples(DataSource(write(row("who", " me"), "", "{")), tokenizer)


def test_templates_come_before_messages(write, tokenizer):
    both = {"query": "who", "answer": " me", "messages": [{"role": "user", "content": "is"}]}
    source = DataSource(write(both), prompt="{query}", completion="{answer}")
    (example,) = load_examples(source, tokenizer)
    assert example["labels"][-2:] == [ME, EOS]
