"""The grid of footprints, through the command line at a tiny shape."""

import dataclasses

import pandas as pd
import pytest

from suites import footprints
from suites.catalog import SUITES
from suites.methods import METHODS
from tests.suites.arena import cell, finished


def test_a_grid_runs_and_leaves_one_table_of_ratios(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(footprints.AXES, "budget", ("r2", "r4"))
    arguments = ["footprint_tiny", "--methods", "frozen,lora,lora-bf16,spiel", "--vary", "budget"]
    assert footprints.main([*arguments, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "tables" / "footprint_tiny-ratios.csv")
    assert list(table["budget"]) == ["r2"] * 4 + ["r4"] * 4
    assert list(table["method"]) == ["frozen", "lora", "lora-bf16", "spiel"] * 2
    for budget in ("r2", "r4"):
        rivals = table[(table["budget"] == budget) & table["method"].isin(footprints.RIVALS)]
        assert rivals["time x lora"].min() == 1
        assert rivals["memory x lora"].min() == 1
    assert (table["ms/step"] > 0).all()
    assert "a train step, and as a ratio to LoRA's" in capsys.readouterr().out


def test_a_method_that_did_not_fit_is_in_the_table_and_none_without_lora():
    suite = SUITES["footprint_tiny"]
    lora = finished(cell("lora", suite=suite))
    full = dataclasses.replace(finished(cell("full", suite=suite)), status="oom")
    rows = footprints.compared({"quantize": "4bit"}, [lora, full])
    assert [row["time x lora"] for row in rows] == ["1.000", "oom"]
    assert rows[0]["quantize"] == "4bit"
    assert footprints.compared({}, [full]) == []


def test_every_flag_left_out_or_given_is_what_anybody_could_type():
    suite = SUITES["footprint"]
    found = [
        footprints.command(suite, ["lora"], setting, "results")
        for setting in footprints.settings(["quantize", "gradient_checkpointing"])
    ]
    start, end = ["footprint", "--methods", "lora"], ["--out", "results"]
    assert found == [
        [*start, *end],
        [*start, "--gradient-checkpointing", *end],
        [*start, "--quantize", "4bit", *end],
        [*start, "--quantize", "4bit", "--gradient-checkpointing", *end],
    ]
    assert len(list(footprints.settings(list(footprints.AXES)))) == 24


def test_every_contestant_of_the_grid_is_a_method_with_a_rate():
    assert set(footprints.METHODS) <= set(METHODS)
    assert set(footprints.METHODS) <= set(SUITES["footprint_13b"].tunings)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["footprint_tine"], "unknown suite 'footprint_tine'; choose from footprint_tiny"),
        (["footprint_tiny", "--methods", "lorra"], "unknown method 'lorra'; choose from lora"),
        (["footprint_tiny", "--vary", "budgets"], "unknown axis 'budgets'; choose from budget"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        footprints.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err
