"""The grid of footprints, through the command line at a tiny shape."""

import dataclasses

import pandas as pd
import pytest

from suites import footprints, record
from suites.catalog import SUITES
from suites.methods import METHODS
from suites.overrides import override
from suites.plan import plan
from suites.record import PhaseCost
from tests.suites.arena import ENVIRONMENT, cell, finished


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


def test_a_quantised_model_has_its_floor_and_is_not_trained_as_a_whole(tmp_path, capsys):
    arguments = ["footprint_tiny", "--methods", "frozen,lora,full,spiel", "--vary", "quantize"]
    assert footprints.main([*arguments, "--out", str(tmp_path)]) == 0
    table = pd.read_csv(tmp_path / "tables" / "footprint_tiny-ratios.csv")
    quantised = table[table["quantize"] == "4bit"]
    assert list(quantised["method"]) == ["frozen", "lora", "spiel"]
    assert (quantised["ms/step"] > 0).all()
    assert "full" in set(table["method"]) - set(quantised["method"])


SUITE = SUITES["footprint_tiny"]
METHODS_OF_GRID = ("lora", "lora-bf16", "spiel")
ON_GPU = dataclasses.replace(ENVIRONMENT, gpus=("A GPU",), device="cuda:0")


def fill(out, made=lambda setting, record: record):
    """Writes a grid of budgets whose records are as `made` makes them, None for none."""
    for setting in footprints.settings(["budget"]):
        for each in plan(override(SUITE, **setting), METHODS_OF_GRID, (0,)):
            if (found := made(setting, finished(each, scores={}))) is not None:
                record.write(found, each.record_path(out))


def present(out, capsys):
    """Status, what is printed, and the rows of the table, if there is one."""
    status = footprints.present(SUITE, METHODS_OF_GRID, ["budget"], out)
    path = out / "tables" / "footprint_tiny-ratios.csv"
    return status, capsys.readouterr().out, pd.read_csv(path) if path.exists() else None


def test_a_method_that_did_not_fit_is_in_the_table():
    lora = finished(cell("lora", suite=SUITE))
    full = dataclasses.replace(finished(cell("full", suite=SUITE)), status="oom")
    rows = footprints.compared({"quantize": "4bit"}, [lora, full])
    assert [row["time x lora"] for row in rows] == ["1.000", "oom"]
    assert rows[0]["quantize"] == "4bit"


def test_a_setting_without_lora_has_no_ratios_but_its_rows(tmp_path, capsys):
    def without_lora(setting, found):
        is_lost = setting["budget"] == "r16" and found.method_name in footprints.RIVALS
        return dataclasses.replace(found, status="oom") if is_lost else found

    fill(tmp_path, without_lora)
    status, _, rows = present(tmp_path, capsys)
    rows = rows[rows["budget"] == "r16"].set_index("method")
    assert status == 1
    assert list(rows.index) == list(METHODS_OF_GRID)
    assert rows.loc["spiel"].tolist() == ["r16", "100.0", "-", "2", "-"]
    assert rows.loc["lora"].tolist() == ["r16", "-", "oom", "-", "oom"]


@pytest.mark.parametrize("peak_bytes", [0, None])
def test_a_rival_without_a_peak_gives_no_ratio_of_memory(peak_bytes):
    lora = finished(cell("lora", suite=SUITE), phases={"train": PhaseCost(1.0, peak_bytes)})
    row = footprints.compared({}, [lora, finished(cell("spiel", suite=SUITE))])[1]
    assert (row["time x lora"], row["MiB"], row["memory x lora"]) == ("1.000", "2", "-")


@pytest.mark.parametrize(
    ("is_elsewhere", "named"),
    [
        (lambda each: each.suite_name.endswith("r8"), "footprint_tiny-budget-r8;"),
        (lambda each: each.method_name == "spiel", "footprint_tiny-budget-r8, "),
    ],
    ids=["between settings", "in each setting"],
)
def test_a_grid_of_two_machines_has_no_table(is_elsewhere, named, tmp_path, capsys):
    def made(setting, found):
        return dataclasses.replace(found, environment=ON_GPU) if is_elsewhere(found) else found

    fill(tmp_path, made)
    status, printed, rows = present(tmp_path, capsys)
    assert (status, rows) == (1, None)
    (line,) = printed.splitlines()
    assert line.startswith("no table: records of different hardware do not share a table (A CPU, ")
    assert f"A GPU, on cuda:0: {named}" in line


def test_a_cell_that_failed_elsewhere_is_in_the_table(tmp_path, capsys):
    def made(setting, found):
        is_lost = setting["budget"] == "r8" and found.method_name == "spiel"
        changes = {"status": "oom", "environment": ON_GPU} if is_lost else {}
        return dataclasses.replace(found, **changes)

    fill(tmp_path, made)
    status, _, rows = present(tmp_path, capsys)
    assert (status, len(rows)) == (1, 9)


def test_every_revision_of_the_code_is_told(tmp_path, capsys):
    newer = dataclasses.replace(ENVIRONMENT, git_revision="f" * 40)

    def made(setting, found):
        return (
            dataclasses.replace(found, environment=newer) if setting["budget"] == "r64" else found
        )

    fill(tmp_path, made)
    status, printed, _ = present(tmp_path, capsys)
    written = (tmp_path / "tables" / "footprint_tiny-ratios.md").read_text()
    assert status == 0
    for text in (printed, written):
        assert "revision 0123456789ab." in text and "revision ffffffffffff." in text


def test_cells_that_are_missing_are_told(tmp_path, capsys):
    def made(setting, found):
        return None if setting["budget"] == "r16" and found.method_name == "spiel" else found

    fill(tmp_path, made)
    status, printed, rows = present(tmp_path, capsys)
    lost = plan(override(SUITE, budget="r16"), ["spiel"], (0,))[0].record_path(tmp_path)
    assert (status, len(rows)) == (1, 8)
    assert f"not counted: {lost}" in printed
    assert f"not counted: {lost}" in (tmp_path / "tables/footprint_tiny-ratios.md").read_text()


def test_a_grid_without_records_has_no_table(tmp_path, capsys):
    status, printed, rows = present(tmp_path, capsys)
    assert (status, rows, printed.count("not counted: ")) == (1, None, 9)


def test_a_table_that_cannot_be_written_is_said(tmp_path, capsys):
    fill(tmp_path)
    (tmp_path / "tables").write_text("a file in the way")
    status, printed, _ = present(tmp_path, capsys)
    assert status == 1
    assert "the table cannot be written" in printed


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
        (
            ["footprint_tine"],
            "unknown footprint suite 'footprint_tine'; choose from footprint_tiny",
        ),
        (["footprint_tiny", "--methods", "lorra"], "unknown method 'lorra'; choose from lora"),
        (["footprint_tiny", "--vary", "budgets"], "unknown axis 'budgets'; choose from budget"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        footprints.main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_suites_with_tasks_are_no_footprints(capsys):
    with pytest.raises(SystemExit):
        footprints.main(["quickstart"])
    assert "unknown footprint suite 'quickstart'; choose from footprint" in capsys.readouterr().err


def test_the_faster_lora_is_the_measure():
    faster = dataclasses.replace(cell(), method="lora-bf16")
    rows = footprints.compared(
        {},
        [
            finished(cell(), seconds=0.2),
            finished(faster, seconds=0.1),
            finished(cell("spiel"), seconds=0.1),
        ],
    )
    assert [row["time x lora"] for row in rows] == ["2.000", "1.000", "1.000"]
