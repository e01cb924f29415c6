"""A tiny model and data sets as the hub has them: real columns, real layout, a few made-up rows.

`DIR/owner/name` is what a download of the repository leaves: parquet files, and a README.md that
names its subsets and splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Row = dict[str, Any]

BOS, EOS = "<s>", "</s>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: ids 0 and 1 are BOS and EOS; like Llama's, it puts BOS first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: i for i, token in enumerate([BOS, EOS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(ids, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, model_max_length=4096
    )


def write_model(folder: Path) -> Path:
    """A Llama of 13,000 weights and its tokenizer, as from_pretrained reads them.

    Random but for this: whatever it read, it says EOS, so that generation does not take long.
    """
    import torch

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight += 1.0
        model.lm_head.weight[config.eos_token_id] += 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_repository(
    folder: Path, name: str, subsets: Mapping[str, Mapping[str, Iterable[Row]]]
) -> Path:
    """The data set `name`: subset -> split -> rows."""
    root = folder / name
    lines = ["---", "configs:"]
    for subset, splits in subsets.items():
        lines += [f"- config_name: {subset}", "  data_files:"]
        for split, rows in splits.items():
            path = root / subset / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
            lines += [f"  - split: {split}", f"    path: {subset}/{split}-*"]
    (root / "README.md").write_text("\n".join([*lines, "---", ""]))
    return root


def write_jsonl(path: Path, rows: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mmlu(subjects: Iterable[str], num_questions: int = 2) -> dict[str, dict[str, list[Row]]]:
    def rows(subject: str, split: str, count: int) -> list[Row]:
        return [
            {
                "question": f"Which is {subject} {split} {i}?",
                "subject": subject,
                "choices": ["one", "two", "three", "four"],
                "answer": i % 4,
            }
            for i in range(count)
        ]

    counts = {"test": num_questions, "validation": num_questions + 1, "dev": 5}
    return {
        subject: {split: rows(subject, split, count) for split, count in counts.items()}
        for subject in subjects
    }


def gsm8k(num_questions: int = 3) -> dict[str, dict[str, list[Row]]]:
    rows = [
        {"question": f"What is {i} and {i}?", "answer": f"{i} + {i} = {2 * i}.\n#### {2 * i}"}
        for i in range(num_questions)
    ]
    return {"main": {"train": rows, "test": rows}}


def wikitext() -> dict[str, dict[str, list[Row]]]:
    rows = [{"page": " = Title = \n\n A page , of text . \n"}, {"page": " Another one . \n"}]
    return {"wikitext-2-raw-v1": {"train": rows, "validation": rows[:1], "test": rows}}


def bbh(tasks: Iterable[str]) -> dict[str, dict[str, list[Row]]]:
    rows = [{"input": f"not {value} is", "target": str(value)} for value in (True, False)]
    return {task: {"test": rows} for task in tasks}


def tydiqa(languages: Iterable[str]) -> dict[str, dict[str, list[Row]]]:
    rows = [
        {
            "id": f"{language}-{i}",
            "title": "Title",
            "context": "The sky is blue.",
            "question": "What is the sky?",
            "answers": {"text": ["blue"], "answer_start": [11]},
        }
        for language in languages
        for i in range(2)
    ]
    return {"secondary_task": {"train": rows, "validation": rows}}


def humaneval() -> dict[str, dict[str, list[Row]]]:
    row = {
        "task_id": "HumanEval/0",
        "prompt": "def same(x):\n    return",
        "canonical_solution": " x",
        "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        "entry_point": "same",
    }
    return {"openai_humaneval": {"test": [row]}}


def conversations(count: int = 12) -> list[Row]:
    return [
        {
            "id": f"flan_v2_{i}",
            "messages": [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"It is {i}."},
            ],
        }
        for i in range(count)
    ]


def alpaca(count: int = 12) -> list[Row]:
    return [
        {"instruction": f"Say {i}.", "input": "" if i % 2 else f"{i}", "output": f"It is {i}."}
        for i in range(count)
    ]


def metamath(count: int = 12) -> list[Row]:
    return [
        {
            "type": "GSM_Rephrased",
            "query": f"What is {i} and {i}?",
            "original_question": "",
            "response": f"{i} + {i} = {2 * i}. The answer is: {2 * i}",
        }
        for i in range(count)
    ]
