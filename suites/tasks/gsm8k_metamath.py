"""Marks for the tasks `gsm8k_metamath` and `gsm8k_metamath_dev`.

The rules are those of peft's method_comparison/MetaMathQA, so that scores stand beside its own.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

#: What stands before a final answer; the first of these that occurs decides.
LEADS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)

#: Questions of the dev task, chosen from GSM8K's train split, which MetaMathQA rewords.
NUM_DEV = 200


def some(docs: Any) -> Any:
    """The dev task's questions: the same `NUM_DEV` each time, or all if there are no more."""
    count = min(NUM_DEV, len(docs))
    return docs.select(sorted(random.Random(0).sample(range(len(docs)), count)))


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the generated text ends in the answer of `doc`."""
    said, right = final_answer(results[0]), final_answer(doc["answer"])
    return {"acc": float(said is not None and number(said) == number(right))}


def final_answer(text: str) -> str | None:
    """What follows the last lead in `text`, up to the end of its line; None without a lead."""
    text = text.strip().rstrip(".!?")
    for lead in LEADS:
        if lead in text:
            answer = text.rpartition(lead)[2].strip().split("\n")[0]
            return answer.strip(" .!?$%")
    return None


def number(text: str | None) -> float | str | None:
    """`text` as a number where it is one, or a fraction; else as it is."""
    try:
        parts = [Decimal(part.strip()) for part in (text or "").split("/")]
        if len(parts) > 2:
            return text
        return float(parts[0] / parts[1] if len(parts) == 2 else parts[0])
    except (DivisionByZero, InvalidOperation):
        return text
