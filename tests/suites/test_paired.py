"""Methods beside LoRA: paired by item and by seed, in groups of subtasks too."""

import dataclasses

import pandas as pd
import pytest

from suites import notes, report, table
from tests.suites.arena import cell, finished, row_of


def with_items(of, *per_item):
    scores = finished(of).scores
    items = dataclasses.replace(
        scores["t"], value=sum(per_item) / len(per_item), per_item=per_item, num_items=len(per_item)
    )
    items = dataclasses.replace(items, doc_ids=tuple(range(len(per_item))))
    return finished(of, scores={**scores, "t": items})


def test_methods_are_compared_with_lora_item_by_item():
    few = [1.0, 1.0] * 4, [1.0, 0.0] * 4
    lora = [with_items(cell(seed=seed), *[0.0] * 32, *few[0]) for seed in range(3)]
    spiel = [with_items(cell("spiel", seed=seed), *[1.0] * 32, *few[1]) for seed in range(3)]
    frame = report.frame(lora + spiel)
    row = row_of(frame, "spiel")
    assert row["target_minus_lora"] == pytest.approx(0.7)
    assert row["target_minus_lora_low"] > 0
    assert row["target_minus_lora_p"] < 0.05
    assert row["retention_minus_lora"] == 0
    assert pd.isna(row_of(frame, "lora")["target_minus_lora"])
    words = dict(zip(frame["method"], table.quality(frame)["vs lora"], strict=True))
    assert words == {"lora": "-", "spiel": "+0.700* / +0.000"}
    (note,) = [each for each in notes.footnotes(frame, lora + spiel) if "bootstrap" in each]
    assert "* p < 0.05" in note
    assert "t test over seeds" in note and "not corrected for the number of comparisons" in note
    alone = notes.footnotes(report.frame(lora), lora)
    assert not any("bootstrap" in each or "comparisons" in each for each in alone)


def test_one_seed_has_no_star():
    lora, spiel = with_items(cell(), *[0.0] * 40), with_items(cell("spiel"), *[1.0] * 40)
    frame = report.frame([lora, spiel])
    assert row_of(frame, "spiel")["target_minus_lora"] == 1.0
    assert pd.isna(row_of(frame, "spiel")["target_minus_lora_low"])
    words = dict(zip(frame["method"], table.quality(frame)["vs lora"], strict=True))
    assert words["spiel"] == "+1.000 / +0.000"


def of_two_subtasks(of, few, many, **changes):
    """A record with a group whose two subtasks count alike: so many right of 10, and of 1,000."""
    items = [*[1.0] * few, *[0.0] * (10 - few), *[1.0] * many, *[0.0] * (1000 - many)]
    scores = finished(of).scores
    values = {
        "value": (few / 10 + many / 1000) / 2,
        "num_items": len(items),
        "per_item": tuple(items),
        "doc_ids": (*range(10), *range(1000)),
        "subtasks": {"few": 10, "many": 1000},
        "weighs_by_size": False,
    }
    target = dataclasses.replace(scores["t"], **{**values, **changes})
    return finished(of, scores={**scores, "t": target})


def test_subtasks_that_count_alike_do_so_beside_lora():
    """By all items alike spiel would be better: 18 more of the 1,010 are right."""
    lora = [of_two_subtasks(cell(seed=seed), 5, 500) for seed in range(3)]
    spiel = [of_two_subtasks(cell("spiel", seed=seed), 3, 520) for seed in range(3)]
    row = row_of(report.frame(lora + spiel), "spiel")
    columns = row["target"] - row_of(report.frame(lora), "lora")["target"]
    assert columns == pytest.approx(-0.09)
    assert row["target_minus_lora"] == pytest.approx(columns)
    low, high = row["target_minus_lora_low"], row["target_minus_lora_high"]
    assert low < columns < high and high - low > 0.1  # ten items decide half of it


def test_subtasks_share_their_tasks_weight():
    def record_of(method, few, many, alone):
        made = of_two_subtasks(cell(method), few, many)
        single = with_items(cell(method), *alone).scores["t"]
        return dataclasses.replace(made, scores={**made.scores, "alone": single})

    lora, spiel = record_of("lora", 5, 500, [1.0, 0.0]), record_of("spiel", 3, 520, [1.0, 1.0])
    frame = report.frame([lora, spiel])
    assert row_of(frame, "spiel")["target_minus_lora"] == pytest.approx(
        row_of(frame, "spiel")["target"] - row_of(frame, "lora")["target"]
    )


def test_other_subtasks_are_not_paired():
    other = of_two_subtasks(cell("spiel"), 3, 520, subtasks={"few": 10, "more": 1000})
    with pytest.raises(report.MixedRecordsError, match="different test items"):
        report.frame([of_two_subtasks(cell(), 5, 500), other])


def test_items_of_other_content_are_not_paired():
    def with_hash(method, items_hash):
        made = with_items(cell(method), 1.0, 0.0)
        asked = dataclasses.replace(made.scores["t"], items_hash=items_hash)
        return dataclasses.replace(made, scores={**made.scores, "t": asked})

    report.frame([with_hash("lora", "a"), with_hash("spiel", "a")])
    report.frame([with_hash("lora", ""), with_hash("spiel", "a")])  # an older record has none
    with pytest.raises(report.MixedRecordsError, match="different test items"):
        report.frame([with_hash("lora", "a"), with_hash("spiel", "b")])


def test_other_items_are_not_paired():
    here = with_items(cell(), 1.0, 0.0)
    there = with_items(cell("spiel"), 1.0, 0.0, 1.0)
    with pytest.raises(report.MixedRecordsError, match="different test items"):
        report.frame([here, there])
