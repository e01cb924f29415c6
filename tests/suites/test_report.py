"""From records to the table: what it says, what it refuses, and that it fits a terminal."""

import dataclasses
import io
import re

import pandas as pd
import pytest
from rich.console import Console

from suites import catalog, documents, notes, record, report, table
from suites.catalog import SUITES
from suites.console import drawn, make_console
from suites.plan import plan
from suites.record import Record
from suites.suite import Tuning
from tests.suites.arena import ENVIRONMENT, cell, finished, row_of, small_suite, write_all


def three_seeds(method, targets, **changes):
    return [
        finished(cell(method, seed=seed), target=target, **changes)
        for seed, target in enumerate(targets)
    ]


def failed(method, seed, reason="the loss is nan at step 3"):
    return Record.of(cell(method, seed=seed), "diverged", reason, record.now())


def test_means_intervals_and_paired_ratio():
    lora = [finished(cell(seed=seed), seconds=0.1 * (seed + 1)) for seed in range(3)]
    spiel = [
        finished(cell("spiel", seed=seed), target=0.1 * (seed + 1), seconds=0.15 * (seed + 1))
        for seed in range(3)
    ]
    row = row_of(report.frame(lora + spiel), "spiel")
    assert row["target"] == pytest.approx(0.2)
    assert row["target_ci95"] == pytest.approx(0.24842, abs=1e-4)
    assert row["step_seconds"] == pytest.approx(0.3)
    assert row["step_ratio_to_lora"] == pytest.approx(1.5)
    assert row["step_ratio_to_lora_ci95"] == pytest.approx(0.0, abs=1e-9)


def test_first_step_is_left_out_and_the_rest_charged():
    found = finished(cell())
    steps = (9.0, 0.1, 0.1, 0.4)
    training = dataclasses.replace(found.training, step_seconds=steps)
    assert report.step_seconds(dataclasses.replace(found, training=training)) == pytest.approx(0.2)


def test_without_lora_there_is_no_ratio():
    assert pd.isna(row_of(report.frame([finished(cell("spiel"))]), "spiel")["step_ratio_to_lora"])


def test_failed_cells_are_told_and_not_averaged():
    frame = report.frame([finished(cell(), target=0.8), failed("lora", 1)])
    row = row_of(frame, "lora")
    assert (row["num_ok"], row["num_seeds"], row["target"]) == (1, 2, 0.8)
    assert row["failures"] == ["seed 1 diverged: the loss is nan at step 3"]
    assert pd.isna(row["target_ci95"])


def test_of_several_kinds_of_hardware_there_is_quality_and_no_cost():
    gpu = dataclasses.replace(ENVIRONMENT, gpus=("A GPU",), device="cuda:0")
    records = [finished(cell()), finished(cell("spiel"), target=0.7, environment=gpu)]
    frame = report.frame(records)
    assert frame["target"].tolist() == [0.5, 0.7]
    assert frame["artifact_bytes"].notna().all()
    costs = ["step_seconds", "train_peak_bytes", "step_ratio_to_lora", "saved_for_backward_bytes"]
    assert frame[costs].isna().all(axis=None)
    found = notes.footnotes(frame, records)
    assert "Made on several kinds of hardware: what took time or memory is left out." in found
    assert any("A GPU, on cuda:0" in note for note in found)


def test_an_untrained_models_scores_have_no_interval():
    records = [finished(cell("base", seed=seed)) for seed in (0, 1)]
    assert table.quality(report.frame(records))["target"].tolist() == ["0.500"]
    assert report.tasks(records)["score_ci95"].isna().all()


def test_each_of_several_tasks_has_its_row(tmp_path, capsys):
    def made(of, **values):
        found = scored(
            of, a=("target", "acc,none"), b=("target", "f1,none"), r=("retention", "acc")
        )
        scores = {
            name: dataclasses.replace(score, value=values.get(name, score.value))
            for name, score in found.scores.items()
        }
        return dataclasses.replace(found, scores=scores)

    cells = [cell(method, seed=seed) for seed in (0, 1) for method in ("lora", "spiel")]
    for of in cells:
        record.write(made(of, a=0.25 if of.method == "spiel" else 0.75), of.record_path(tmp_path))
    assert table.present(cells, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "small: tasks" in printed and "mean of accuracy (a), f1 (b)" in printed
    found = pd.read_csv(tmp_path / "tables" / "small-tasks.csv")
    assert found[["task", "method", "score"]].to_numpy().tolist()[:4] == [
        ["a", "lora", 0.75],
        ["a", "spiel", 0.25],
        ["b", "lora", 0.5],
        ["b", "spiel", 0.5],
    ]
    assert found["minus_lora"].isna().tolist() == [True, False] * 3
    assert table.scores(found)["score"][1] == "0.250 ± 0.000"


def test_other_suites_or_worlds_do_not_mix():
    here = finished(cell())
    for other, what in [
        (finished(cell("spiel"), world="world-2"), "embedded world"),
        (dataclasses.replace(finished(cell("spiel")), suite_hash="f00"), "suite hash"),
    ]:
        with pytest.raises(report.MixedRecordsError, match=f"{what} .*lora seed 0.*spiel seed 0"):
            report.frame([here, other])


def test_marks_and_notes():
    records = [finished(cell("full")), finished(cell("spiel"), num_trainable=90), finished(cell())]
    frame = report.frame(records)
    weights = dict(zip(frame["method"], table.quality(frame)["weights"], strict=True))
    assert weights == {"full": "100†", "spiel": "90†", "lora": "100"}
    found = notes.footnotes(frame, records)
    assert "† not matched to the budget of 100 weights." in found
    assert any("One seed has no interval" in note for note in found)
    assert any("A CPU, 2 threads" in note and "0123456789ab" in note for note in found)


def test_a_table_tells_how_steady_the_machine_was():
    def beside(method, *seconds, **changes):
        return finished(
            cell(method), training=record.Training(yardstick_seconds=seconds), **changes
        )

    steady = [beside("lora", 0.020, 0.021), beside("spiel", 0.020, 0.022)]
    (note,) = notes.speed(steady)
    assert "took 20 to 22 ms" in note and "differed" not in note
    assert note in notes.footnotes(report.frame(steady), steady)
    (note,) = notes.speed([*steady, beside("full", 0.022, 0.050)])
    assert "took 20 to 50 ms" in note and "differed 2.5-fold, and so may the run times" in note
    assert notes.speed([finished(cell())]) == [], "records of before yardsticks say nothing"


def test_the_notes_name_what_the_columns_do_not_show():
    def made(method, dtype, dropped=0, **tuning):
        found = finished(dataclasses.replace(cell(method), tuning=Tuning(1e-3, **tuning)))
        size = dataclasses.replace(found.size, trainable_dtypes=(dtype,))
        training = dataclasses.replace(found.training, num_dropped=dropped, num_truncated=4)
        return dataclasses.replace(found, size=size, training=training)

    alike = [made("lora", "float32"), made("spiel", "float32")]
    assert notes.unlike(alike) == []
    assert notes.unlike([made("full", "bfloat16"), *alike]) == [
        "Trained weights are bfloat16: full; float32: lora, spiel. In 16 bits small updates round "
        "to nothing."
    ]
    decayed = [made("lora", "float32"), made("spiel", "float32", weight_decay=30.0)]
    assert notes.unlike(decayed) == ["Weight decay: lora 0, spiel 30."]
    (note,) = notes.data([made("lora", "float32", dropped=30)])
    assert "of 40 rows 30 were dropped" in note and "4 were cut at that limit" in note
    assert notes.data([made("lora", "float32")]) == [
        "Training data: of 10 rows 4 were cut at the limit of length."
    ]
    assert set(notes.unlike(decayed)) < set(notes.footnotes(report.frame(decayed), decayed))


def test_cut_prompts_are_told():
    def made(method, num_cut):
        found = finished(cell(method))
        scores = {"t": dataclasses.replace(found.scores["t"], num_cut=num_cut)}
        return dataclasses.replace(found, scores={**found.scores, **scores})

    assert notes.prompts([made("lora", 0), made("spiel", 0)]) == []
    assert notes.prompts([made("lora", 3), made("spiel", 3), made("prefix", 1200)]) == [
        "Requests (one an answer) that lost their beginning, as the model has no room for more: "
        "3 of t (lora, spiel); 1,200 of t (prefix)."
    ]


def test_the_notes_tell_where_learning_rates_are_from():
    suite = small_suite()
    (lora, full), (like,) = (
        plan(suite, names, (0,)) for names in (["lora", "full"], ["lora-bf16"])
    )
    picked = dataclasses.replace(full, tuning=Tuning(7.0))
    assert notes.rates([lora, picked, like]) == [
        "Learning rates: lora: the suite's own (--search picks them on dev); full: picked on dev; "
        "lora-bf16: lora's, for want of one of their own. At an edge of its grid, beyond which a "
        "better one may lie: lora, full, lora-bf16."
    ]
    bare = [dataclasses.replace(each, suite=small_suite(grids={})) for each in (lora, like)]
    assert notes.rates(bare[:1]) == []
    (told,) = notes.rates(bare)
    assert told.endswith("lora-bf16: lora's, for want of one of their own.")
    frozen = dataclasses.replace(like, method="frozen")
    assert notes.rates([frozen]) == [], "what trains nothing has no rate"


def test_methods_of_several_versions_of_a_library_are_told():
    def made(method, version):
        packages = {"torch": "2.13.0", "peft": version}
        environment = dataclasses.replace(ENVIRONMENT, packages=packages)
        return finished(cell(method), environment=environment)

    (told,) = notes.versions([made("lora", "1"), made("full", "1"), made("spiel", "2")])
    assert told == "Of peft several versions: 1 for lora, full; 2 for spiel."
    assert notes.versions([made("lora", "1"), made("spiel", "1")]) == []


def test_seeds_of_one_method_by_several_versions_of_the_code_are_told():
    def made(method, seed, code_hash):
        environment = dataclasses.replace(ENVIRONMENT, code_hash=code_hash)
        return finished(cell(method, seed=seed), environment=environment)

    records = [made("lora", 0, "a"), made("lora", 1, "b"), made("spiel", 0, "b")]
    assert notes.versions(records) == [
        "Of code several versions: a for lora seed 0; b for lora seed 1, spiel."
    ]
    assert set(notes.versions(records)) < set(notes.footnotes(report.frame(records), records))


@pytest.mark.parametrize("what", ["model weights", "training data"])
def test_what_was_learned_from_other_data_or_weights_shares_no_table(what):
    one, two = (
        finished(cell(method), loaded={what: each, "attention": each})
        for method, each in (("lora", "a"), ("spiel", "b"))
    )
    with pytest.raises(report.MixedRecordsError, match=f"different {what}.*a: lora seed 0; b: spi"):
        report.frame([one, two])
    report.frame([one, dataclasses.replace(two, loaded={"attention": "b"})])
    assert "Of attention several versions: a for lora; b for spiel." in notes.versions([one, two])


def test_seeds_of_one_method_have_as_many_weights():
    one, two = finished(cell()), finished(cell(seed=1), num_trainable=99)
    with pytest.raises(report.MixedRecordsError, match="100: lora seed 0; 99: lora seed 1"):
        report.frame([one, two])
    report.frame([one, dataclasses.replace(two, method_name="full")])


def scored(of, **tasks):
    """A record with `tasks`: name -> (role, metric)."""
    like = finished(of).scores["t"]
    scores = {
        name: dataclasses.replace(like, role=role, metric=metric)
        for name, (role, metric) in tasks.items()
    }
    return finished(of, scores=scores)


def legend(*records):
    return notes.footnotes(report.frame(records), records)[0]


def test_the_legend_names_the_metrics_of_the_records():
    suite_of = {
        name: {t.name: (t.role, t.metric) for t in SUITES[name].tasks_of("test")} for name in SUITES
    }
    world = scored(cell(), **suite_of["quickstart"])
    assert legend(world, failed("spiel", 0)).startswith("target, retention: accuracy. ±: half")
    mmlu = scored(cell(), **suite_of["mmlu_flan"])
    assert legend(mmlu).startswith("target: accuracy; retention: byte likelihood. ±")
    paper = scored(cell(), **suite_of["flan_v2"])
    assert legend(paper).startswith(
        "target: mean of accuracy (mmlu), exact match (gsm8k_cot, bbh_cot_fewshot), "
        "f1 (tydiqa_goldp); retention: byte likelihood. ±"
    )
    assert legend(scored(cell())).startswith("±: half")


def test_latex_means_what_the_table_says(tmp_path):
    records = [finished(cell("full")), *three_seeds("lora", (0.5, 0.6, 0.7))]
    records.append(finished(cell("spiel"), num_trainable=90))
    frame = report.frame(records)
    tables = {"Quality": table.quality(frame), "Cost": table.cost(frame)}
    text = documents.latex(tables, notes.footnotes(frame, records), "small_100%")
    assert text.count(r"\begin{table}") == text.count(r"\bottomrule") == 2
    assert r"\caption{small\_100\%: quality}" in text
    assert r"method & seeds & weights & \% & lr & target & retention & vs lora \\" in text
    assert "0.600 ± 0.248" in text
    assert r"beyond what the libraries hold" in text[text.index(r"\footnotesize") :]
    assert text.rstrip().endswith(r"\end{table}")
    unescaped = re.sub(r"\\[%#_&]|&| \\\\|^%.*|\$-\$", "", text, flags=re.MULTILINE)
    assert not set(unescaped) & set("%#&<>|")


def test_what_means_something_to_latex_is_escaped():
    assert documents.escaped(r"a_b 5% & #1 {x} \y ~ ^ < > |") == (
        r"a\_b 5\% \& \#1 \{x\} \textbackslash{}y \textasciitilde{} \textasciicircum{}"
        r" \textless{} \textgreater{} \textbar{}"
    )
    assert (
        documents.escaped("-0.8* / +0.1, 1e-05, lora-r8, -") == "$-$0.8* / +0.1, 1e-05, lora-r8, -"
    )
    assert documents.escaped("a---b") == "a-{}-{}-b"
    assert documents.escaped("--search ± † \x1b[1m→ é") == "-{}-search ± † ?[1m? é"


def test_no_number_is_cut_where_the_terminal_is_narrow():
    console = Console(width=40, file=io.StringIO())
    console.print(drawn("t", pd.DataFrame([{"method": "a", "n": "1,234,567†", "m": "x" * 30}])))
    assert "…" not in console.file.getvalue()


def test_brackets_in_a_name_are_printed(capsys):
    name = "peft:runs[old]/adapter_config.json"
    make_console().print(drawn("t", pd.DataFrame([{"method": name}])))
    assert name in capsys.readouterr().out


def test_table_is_printed_within_100_columns_and_written(tmp_path, capsys):
    cells = [cell(method, seed=seed) for method in ("base", "full", "lora") for seed in range(3)]
    records = [
        finished(c, target=0.1 * c.seed, seconds=1.5 + c.seed, num_trainable=123_456_789)
        for c in cells
    ]
    write_all(records, cells, tmp_path)
    table.present(cells, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    drawn = [line for line in lines if line.startswith(("│", "┃"))]
    assert drawn
    assert max(len(line) for line in drawn) <= 100
    assert not any("…" in line for line in drawn)
    assert f"records: {tmp_path / 'records' / 'small' / 'world'}" in lines
    markdown = (tmp_path / "tables" / "small.md").read_text()
    assert "| lora " in markdown
    csv = pd.read_csv(tmp_path / "tables" / "small.csv")
    assert list(csv["method"]) == ["base", "full", "lora"]
    assert csv["target"].tolist() == pytest.approx([0.1] * 3)


def test_exit_status_follows_the_cells(tmp_path, capsys):
    cells = [cell(seed=0), cell(seed=1)]
    write_all([finished(cells[0]), finished(cells[1])], cells, tmp_path)
    assert table.present(cells, tmp_path) == 0
    record.write(failed("lora", 1), cells[1].record_path(tmp_path))
    assert table.present(cells, tmp_path) == 1
    cells[1].record_path(tmp_path).write_text("{")
    capsys.readouterr()
    assert table.present(cells, tmp_path) == 1
    assert f"not counted: {cells[1].record_path(tmp_path)}" in capsys.readouterr().out


def test_seeds_that_are_missing_or_damaged_are_told(tmp_path, capsys):
    cells = [cell(method, seed=seed) for seed in range(3) for method in ("full", "lora", "spiel")]
    lora = [each for each in cells if each.method == "lora"]
    write_all([finished(lora[0]), finished(lora[1])], lora[:2], tmp_path)
    lora[1].record_path(tmp_path).write_text("{")
    full = [each for each in cells if each.method == "full"]
    write_all([finished(each) for each in full], full, tmp_path)

    assert table.present(cells, tmp_path) == 1
    lines = [line.split("│") for line in capsys.readouterr().out.splitlines()]
    seeds = [[part.strip() for part in line[1:3]] for line in lines if "/3 " in "".join(line[2:3])]
    assert seeds == [["full", "3/3"], ["lora", "1/3"], ["spiel", "0/3"]]
    csv = pd.read_csv(tmp_path / "tables" / "small.csv")
    assert csv["num_seeds"].tolist() == [3, 3, 3]
    assert csv["num_ok"].tolist() == [3, 1, 0]
    for ending in ("md", "tex", "html"):
        text = (tmp_path / "tables" / f"small.{ending}").read_text()
        assert text.count("not counted: ") == (2 * 5 if ending == "tex" else 5)  # below each table
        assert lora[2].record_path(tmp_path).name in text


def test_table_of_failures_alone_tells_them(tmp_path, capsys):
    record.write(failed("lora", 0), cell().record_path(tmp_path))
    assert table.present([cell()], tmp_path) == 1
    assert "lora: seed 0 diverged: the loss is nan at step 3" in capsys.readouterr().out


def test_table_that_cannot_be_written_is_said(tmp_path, capsys):
    record.write(finished(cell()), cell().record_path(tmp_path))
    (tmp_path / "tables").write_text("a file in the way")
    assert table.present([cell()], tmp_path) == 1
    assert "the table cannot be written" in capsys.readouterr().out


def test_what_steps_cost_is_in_the_columns():
    found = finished(cell())  # 30 tokens in three steps of 0.1 seconds
    training = dataclasses.replace(found.training, num_tokens=30, first_step_flops=10**9)
    row = row_of(report.frame([dataclasses.replace(found, training=training)]), "lora")
    assert row["tokens_per_second"] == pytest.approx(100)
    assert row["first_step_flops"] == 10**9
    assert row["callback_seconds_per_step"] == pytest.approx(0.01)


def test_without_tasks_there_is_a_dash_for_every_score(tmp_path, capsys):
    suite = catalog.SUITES["footprint_tiny"]
    cells = [cell(method, suite=suite) for method in ("lora", "spiel")]
    records = [finished(each, scores={}) for each in cells]
    frame = report.frame(records)
    assert table.quality(frame)["target"].tolist() == ["-", "-"]
    write_all(records, cells, tmp_path)
    assert table.present(cells, tmp_path) == 0


def test_a_record_of_other_settings_is_not_counted(tmp_path):
    of = cell()
    record.write(dataclasses.replace(finished(of), cell_hash="f00"), of.record_path(tmp_path))
    found, (problem,) = table.load([of], tmp_path)
    assert found == []
    assert problem.endswith("made with other settings, data or embedded world than these")


def test_steps_of_a_failed_cell_do_not_count():
    half = dataclasses.replace(finished(cell("spiel", seed=1), seconds=9.0), status="failed")
    frame = report.frame([finished(cell()), finished(cell(seed=1)), finished(cell("spiel")), half])
    assert row_of(frame, "spiel")["step_ratio_to_lora"] == pytest.approx(1.0)


def test_the_share_of_weights_is_of_all_the_models():
    assert row_of(report.frame([finished(cell())]), "lora")["trainable_percent"] == 10


def test_half_widths_are_in_the_unit_of_the_mean():
    assert table.spread({"x": 0.1, "x_ci95": 0.02}, "x", ".1f", 1000) == "100.0 ± 20.0"
