"""Conversations: the assistant's turns are learnt, to the mark that ends them, and nothing else."""

import pytest

from suites.data import IGNORED, load_examples
from suites.models import TULU_TEMPLATE
from suites.suite import DataSource
from tests.suites.hub_files import byte_tokenizer, write_jsonl

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
    {"role": "assistant", "content": "Four."},
]

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)

#: Writes an empty thought before an answer only while that is the last turn, as Qwen's do.
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

REFUSING = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('no system messages') }}{% endif %}{{ m.content }}{% endfor %}"
)


def load(tmp_path, template, *rows, **options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    return tokenizer, load_examples(DataSource(str(path), **options), tokenizer)


def hidden(whole: str, learnt: list[str]) -> str:
    """`whole` with a zero for every character outside the stretches `learnt`."""
    kept = ["\0"] * len(whole)
    for stretch in learnt:
        start = whole.index(stretch)
        kept[start : start + len(stretch)] = stretch
    return "".join(kept)


@pytest.mark.parametrize(
    ("template", "turns", "whole", "learnt"),
    [
        (
            TULU_TEMPLATE,
            TURNS,
            "<s><|system|>\nBe brief.\n<|user|>\nOne?\n<|assistant|>\nTwo.</s>\n"
            "<|user|>\nThree?\n<|assistant|>\nFour.</s>",
            ["Two.</s>", "Four.</s>"],
        ),
        (
            CHATML,
            TURNS,
            "<s><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?<|im_end|>\n"
            "<|im_start|>assistant\nTwo.<|im_end|>\n<|im_start|>user\nThree?<|im_end|>\n"
            "<|im_start|>assistant\nFour.<|im_end|>\n",
            ["Two.<|im_end|>\n", "Four.<|im_end|>\n"],
        ),
        (
            LLAMA_2,
            TURNS[1:],
            "<s>[INST] One? [/INST] Two. </s><s>[INST] Three? [/INST] Four. </s>",
            [" Two. </s>", " Four. </s>"],
        ),
        (
            THINKING,
            TURNS[1:],
            "<s><|user|>\nOne?<end>\n<|assistant|>\nTwo.<end>\n"
            "<|user|>\nThree?<end>\n<|assistant|>\n<think></think>Four.<end>\n",
            ["Two.<end>\n", "<think></think>Four.<end>\n"],
        ),
    ],
    ids=["tulu", "chatml", "llama-2", "thinking"],
)
def test_the_assistants_turns_are_learnt(tmp_path, template, turns, whole, learnt):
    tokenizer, (example,) = load(tmp_path, template, {"messages": turns})
    assert tokenizer.decode(example["input_ids"]) == whole
    shown = [
        tokenizer.decode([label]) if label != IGNORED else "\0" * len(tokenizer.decode([own]))
        for label, own in zip(example["labels"], example["input_ids"], strict=True)
    ]
    assert "".join(shown) == hidden(whole, learnt)


def test_masks_by_hand(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bé"}]
    tokenizer, (example,) = load(tmp_path, TULU_TEMPLATE, {"messages": turns})
    head = len("<|user|>\na\n<|assistant|>\n")
    answer = tokenizer.convert_tokens_to_ids(["b", "Ã", "©", "</s>"])
    assert example["labels"] == [IGNORED] * (1 + head) + answer
    assert example["input_ids"][0] == tokenizer.bos_token_id


def test_a_conversation_is_cut_and_may_be_left_without_a_target(tmp_path):
    short = {"messages": TURNS[1:3]}
    long = {"messages": [{"role": "user", "content": "x" * 90}, TURNS[2]]}
    none = {"messages": TURNS[:2]}
    _, examples = load(
        tmp_path, TULU_TEMPLATE, short, long, none, {"messages": TURNS}, max_length=60
    )
    assert len(examples) == 2
    assert examples.num_dropped == 2
    assert len(examples[1]["labels"]) == 60


def test_the_column_may_have_another_name(tmp_path):
    rows = {"chat": TURNS, "id": "1"}
    _, (example,) = load(tmp_path, TULU_TEMPLATE, rows, messages="chat")
    num_learnt = len(example["labels"]) - example["labels"].count(IGNORED)
    assert num_learnt == len("Two.Four.") + 2


def test_the_whole_conversation_is_learnt_if_asked_for(tmp_path):
    _, (example,) = load(tmp_path, TULU_TEMPLATE, {"messages": TURNS}, mask_prompt=False)
    assert example["labels"] == [IGNORED, *example["input_ids"][1:]]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "line 2: field 'messages' must be a list of messages, got an empty list"),
        ("hello", "line 2: field 'messages' must be a list of messages, got str"),
        ([{"role": "user"}], "line 2: message 1 has no string 'content'"),
        ([*TURNS, {"role": 1, "content": ""}], "line 2: message 6 has no string 'role'"),
    ],
)
def test_a_bad_conversation_is_named(tmp_path, messages, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, TULU_TEMPLATE, {"messages": TURNS}, {"messages": messages})


def test_what_a_template_refuses_is_named(tmp_path):
    with pytest.raises(ValueError, match="line 1: the chat template refuses it: no system messag"):
        load(tmp_path, REFUSING, {"messages": TURNS})


def test_tulus_template_prompts_the_assistant():
    text = byte_tokenizer().apply_chat_template(
        TURNS[:2], chat_template=TULU_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert text == "<|system|>\nBe brief.\n<|user|>\nOne?\n<|assistant|>\n"
