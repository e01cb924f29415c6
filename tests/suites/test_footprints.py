"""The grid of footprints, through the command line at a tiny shape."""

import dataclasses

import pandas as pd
import pytest

from suites import footprints
from suites.catalog import SUITES
from suites.methods import METHODS
from suites.record import PhaseCost
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


SUITE = SUITES["footprint_tiny"]


def test_a_method_that_did_not_fit_is_in_the_table():
    lora = finished(cell("lora", suite=SUITE))
    full = dataclasses.replace(finished(cell("full", suite=SUITE)), status="oom")
    rows = footprints.compared({"quantize": "4bit"}, [lora, full])
    assert [row["time x lora"] for row in rows] == ["1.000", "oom"]
    assert rows[0]["quantize"] == "4bit"


def test_a_setting_without_lora_has_its_rows():
    (row,) = footprints.compared({}, [finished(cell("spiel", suite=SUITE))])
    assert list(row.values()) == ["spiel", "100.0", "-", "2", "-"]


@pytest.mark.parametrize("peak_bytes", [0, None])
def test_a_rival_without_a_peak_gives_no_ratio_of_memory(peak_bytes):
    lora = finished(cell("lora", suite=SUITE), phases={"train": PhaseCost(1.0, peak_bytes)})
    row = footprints.compared({}, [lora, finished(cell("spiel", suite=SUITE))])[1]
    assert (row["time x lora"], row["MiB"], row["memory x lora"]) == ("1.000", "2", "-")


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
