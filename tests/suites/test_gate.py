"""The gate: what counts as worse, slower and larger, what does not, and the command around it."""

import dataclasses

import numpy as np
import pytest

from suites import gate, judgement, provenance, record, report, stats
from suites.judgement import BETTER, SAME, UNJUDGED, UNSURE, WORSE
from suites.plan import plan
from suites.record import PhaseCost, Record
from suites.suite import Tuning
from tests.suites.arena import ENVIRONMENT, cell, finished, small_suite

ITEMS = 40


def run(method, num_right=30, seconds=0.1, seed=0, train_bytes=2**21, **changes):
    """A record whose target task got the first `num_right` of its items right."""
    made = finished(cell(method, seed=seed), seconds=seconds, **changes)
    right = tuple(float(item < num_right) for item in range(ITEMS))
    target = dataclasses.replace(
        made.scores["t"],
        value=num_right / ITEMS,
        num_items=ITEMS,
        per_item=right,
        doc_ids=tuple(range(ITEMS)),
    )
    phases = {**made.phases, "train": PhaseCost(2.0, train_bytes)}
    return dataclasses.replace(made, scores={**made.scores, "t": target}, phases=phases)


def both(spiel=(), lora=(), seeds=(0, 1)):
    """SpIEL's and LoRA's records, each with what is given for every seed alike."""
    return [
        run(method, seed=seed, **dict(given))
        for method, given in {"lora": lora, "spiel": spiel}.items()
        for seed in seeds
    ]


def verdicts(now, before=None):
    """But for LoRA's step time, which is shown and never judged."""
    findings = judgement.judge(now, both() if before is None else before)
    found = {(each.method, each.measure): each.verdict for each in findings}
    assert found.pop(("lora", "step time ms"), UNJUDGED) == UNJUDGED
    return found


def test_nothing_changed():
    found = verdicts(both())
    assert set(found.values()) == {SAME}
    assert {measure for method, measure in found if method == "spiel"} == {
        "cells ok",
        "target",
        "retention",
        "step time x lora",
        "train peak MiB",
        "trained weights",
        "saved for backward MiB",
        "optimizer state MiB",
        "artifact MiB",
    }


@pytest.mark.parametrize(
    ("change", "measure", "verdict"),
    [
        ({"num_right": 20}, "target", WORSE),
        ({"num_right": 40}, "target", BETTER),
        ({"num_right": 29}, "target", UNSURE),  # one item of 40 may be chance
        ({"seconds": 0.12}, "step time x lora", WORSE),
        ({"seconds": 0.102}, "step time x lora", SAME),
        ({"seconds": 0.08}, "step time x lora", BETTER),
        ({"train_bytes": 2**22}, "train peak MiB", WORSE),
        ({"train_bytes": 2**20}, "train peak MiB", BETTER),
    ],
)
def test_one_measure_changed(change, measure, verdict):
    found = verdicts(both(spiel=change))
    assert found.pop(("spiel", measure)) == verdict
    assert set(found.values()) == {SAME}


def test_a_group_is_judged_as_its_value_is_made():
    """Half of the small subtask was lost, which is a quarter of the value and 4 % of the items."""

    def with_group(each, few, many):
        values = {"value": (few / 40 + many / 460) / 2, "num_items": 500, "weighs_by_size": False}
        items = (*[1.0] * few, *[0.0] * (40 - few), *[1.0] * many, *[0.0] * (460 - many))
        parts = {"per_item": items, "doc_ids": tuple(range(500)), "subtasks": {"a": 40, "b": 460}}
        target = dataclasses.replace(each.scores["t"], **values, **parts)
        return dataclasses.replace(each, scores={**each.scores, "t": target})

    before = [with_group(each, 40, 100) for each in both()]
    now = [with_group(each, 20, 122) for each in both()]  # two more are right
    assert verdicts(now, before)["spiel", "target"] == WORSE


def test_a_slower_machine_is_no_slower_method():
    assert set(verdicts(both(spiel={"seconds": 0.2}, lora={"seconds": 0.2})).values()) == {SAME}


@pytest.mark.parametrize(
    ("seconds", "verdict"),
    [
        ((0.07, 0.1, 0.14), SAME),  # noise about the same mean
        ((0.09, 0.1, 0.2), UNSURE),
        ((0.13, 0.12, 0.15), WORSE),
    ],
)
def test_what_three_seeds_tell_of_time(seconds, verdict):
    now = [run("lora", seed=seed) for seed in range(3)]
    now += [run("spiel", seed=seed, seconds=each) for seed, each in enumerate(seconds)]
    assert verdicts(now, both(seeds=(0, 1, 2)))["spiel", "step time x lora"] == verdict


@pytest.mark.parametrize(
    ("slower", "num_seeds", "least", "most"),
    [(1.0, 3, 0, 0.03), (1.2, 3, 0.55, 0.75), (1.2, 5, 0.9, 1)],
)
def test_how_often_a_slower_step_is_seen(slower, num_seeds, least, most):
    """What README says of steps whose ratio to LoRA's has 5 % of noise."""
    noise = np.random.default_rng(0).normal(1.0, 0.05, (400, 2, num_seeds))
    found = [
        judgement._cost("spiel", "", dict(enumerate(slower * now)), dict(enumerate(then)), True)
        for now, then in noise
    ]
    assert least <= sum(each.verdict == WORSE for each in found) / len(found) <= most


@pytest.mark.parametrize(
    ("right", "verdict"), [((29, 31, 29), SAME), ((22, 30, 24), UNSURE), ((10, 22, 16), WORSE)]
)
def test_what_three_seeds_tell_of_accuracy(right, verdict):
    now = [run("spiel", each, seed=seed) for seed, each in enumerate(right)]
    assert verdicts(now, both(lora={}, seeds=(0, 1, 2))[3:])["spiel", "target"] == verdict


def test_more_memory_of_lora_is_worse_and_hides_none_of_spiels():
    found = verdicts(both(spiel={"train_bytes": 2**22}, lora={"train_bytes": 2**22}))
    worse = {key for key, verdict in found.items() if verdict == WORSE}
    assert worse == {("lora", "train peak MiB"), ("spiel", "train peak MiB")}


def sized(found, **sizes):
    return dataclasses.replace(found, size=dataclasses.replace(found.size, **sizes))


def test_one_percent_more_weights_are_worse_and_half_of_the_state_is_better():
    now = both()
    more = [*now[:2], *(sized(each, num_trainable=101) for each in now[2:])]
    assert verdicts(more)["spiel", "trained weights"] == WORSE
    less = [*now[:2], *(sized(each, optimizer_state_bytes=2**19) for each in now[2:])]
    assert verdicts(less)["spiel", "optimizer state MiB"] == BETTER


def test_two_percent_of_time_are_no_progress():
    assert verdicts(both(spiel={"seconds": 0.098}))["spiel", "step time x lora"] == SAME


@pytest.mark.parametrize("name", judgement.SIZES)
@pytest.mark.parametrize("cpu", [ENVIRONMENT.cpu, "another"])
def test_a_larger_size(name, cpu):
    now = both(*[{"environment": dataclasses.replace(ENVIRONMENT, cpu=cpu)}] * 2)
    found = verdicts([*now[:2], *(sized(each, **{name: 2**21}) for each in now[2:])])
    measure = judgement.SIZES[name][0]
    assert [key for key, verdict in found.items() if verdict == WORSE] == [("spiel", measure)]


def test_a_cell_that_failed_is_worse():
    now = both()
    now[-1] = Record.of(cell("spiel", seed=1), "diverged", "the loss is nan", record.now())
    assert verdicts(now)["spiel", "cells ok"] == WORSE
    assert verdicts(both(), now)["spiel", "cells ok"] == SAME


@pytest.mark.parametrize(
    ("lost", "measure"),
    [
        ({"phases": {}}, "train peak MiB"),
        ({"size": None}, "artifact MiB"),
        ({"scores": {}}, "target"),
    ],
)
def test_a_measure_that_is_missing_now_is_worse(lost, measure):
    now = both()
    now[2:] = [dataclasses.replace(each, **lost) for each in now[2:]]
    assert verdicts(now)["spiel", measure] == WORSE


def test_without_lora_or_with_one_seed_costs_are_not_judged():
    slow = {"seconds": 9.0}
    found = verdicts(both(slow)[2:], both()[2:])
    assert found["spiel", "step time x lora"] == UNJUDGED
    assert verdicts(both(slow)[2:])["spiel", "step time x lora"] == WORSE  # LoRA is missing now
    found = verdicts(both(slow, seeds=(0,)), both(seeds=(0,)))
    assert found["spiel", "step time x lora"] == UNJUDGED


def test_one_seed_that_is_left_is_worse_by_that_alone():
    found = verdicts(both({"seconds": 9.0}, seeds=(0,)))
    assert {name for (_, name), verdict in found.items() if verdict == WORSE} == {"cells ok"}
    assert found["spiel", "step time x lora"] == UNJUDGED


def test_a_kept_cell_that_is_no_longer_there_is_worse():
    failed = Record.of(cell("spiel", seed=2), "oom", "no memory", record.now())
    assert verdicts(both(), [*both(), failed])["spiel", "cells ok"] == WORSE


def test_nothing_is_divided_by_a_peak_of_zero():
    found = verdicts(both({"train_bytes": 0}), both({"train_bytes": 0}))
    assert found["spiel", "train peak MiB"] == UNJUDGED


def test_another_world_is_refused():
    now = [dataclasses.replace(each, world="another") for each in both()]
    with pytest.raises(judgement.MixedRecordsError, match="keep a new run"):
        judgement.judge(now, both())


def test_a_failed_cell_elsewhere_does_not_hide_costs():
    gpu = dataclasses.replace(ENVIRONMENT, gpus=("A GPU",), device="cuda:0")
    lost = dataclasses.replace(run("spiel", seed=2, environment=gpu), status="oom")
    assert verdicts(both({"seconds": 9.0}), [*both(), lost])["spiel", "step time x lora"] == WORSE


def test_costs_of_other_hardware_are_not_judged():
    gpu = dataclasses.replace(ENVIRONMENT, gpus=("A GPU",), device="cuda:0")
    now = [
        run(method, 20, 9.0, seed, train_bytes=2**30, environment=gpu)
        for method in ("lora", "spiel")
        for seed in (0, 1)
    ]
    found = verdicts(now, both())
    assert found.pop(("lora", "target")) == found.pop(("spiel", "target")) == WORSE
    costs = ("step time x lora", "train peak MiB", "saved for backward MiB")
    assert {found["spiel", measure] for measure in costs} == {UNJUDGED}
    assert WORSE not in found.values()


def test_a_collapse_on_few_items_is_worse_and_a_slip_is_not():
    def few(each):
        score = each.scores["t"]
        cut = dataclasses.replace(
            score, per_item=score.per_item[:20], doc_ids=score.doc_ids[:20], num_items=20
        )
        return dataclasses.replace(each, scores={**each.scores, "t": cut})

    def judged(num_right):
        now = [few(run(m, num_right, seed=s)) for m in ("lora", "spiel") for s in (0, 1, 2)]
        before = [few(run(m, 20, seed=s)) for m in ("lora", "spiel") for s in (0, 1, 2)]
        return verdicts(now, before)["spiel", "target"]

    assert judged(0) == WORSE
    assert judged(18) == UNSURE


def test_one_seed_is_never_sure_of_accuracy():
    now = [run(method, 20) for method in ("lora", "spiel")]
    found = verdicts(now, both(seeds=(0,)))
    assert found["lora", "target"] == found["spiel", "target"] == UNSURE
    now = [run(method, 40) for method in ("lora", "spiel")]
    assert verdicts(now, both(seeds=(0,)))["spiel", "target"] == SAME


def test_what_is_shown_is_of_the_seeds_that_are_judged():
    before = [*both(), *(run(m, 0, train_bytes=2**25, seed=2) for m in ("lora", "spiel"))]
    shown = {(each.method, each.measure): each for each in judgement.judge(both(), before)}
    peak, target = shown["spiel", "train peak MiB"], shown["spiel", "target"]
    assert (peak.before, peak.now) == (2, 2)
    assert target.before == target.now == 0.75


def test_tasks_beside_a_group_count_as_they_do_in_the_mean():
    def beside(each, num_right):
        half = [*[1.0] * 50, *[0.0] * 50]
        items = (*[float(n < num_right) for n in range(100)], *half)
        parts = {"per_item": items, "doc_ids": tuple(range(200)), "num_items": 200}
        group = dataclasses.replace(
            each.scores["t"], subtasks={"a": 100, "b": 100}, weighs_by_size=False, **parts
        )
        alone = dataclasses.replace(
            each.scores["t"], per_item=items[100:], doc_ids=tuple(range(100)), num_items=100
        )
        return dataclasses.replace(each, scores={**each.scores, "t": group, "alone": alone})

    before, now = ([beside(each, right) for each in both()] for right in (52, 48))
    (found,) = {
        stats.paired_difference(*report.item_differences(now[2:], before[2:], "target")).mean
    }
    assert found == pytest.approx(-0.04 / 2 / 2)
    # 0.01 of the value, which is let pass; by arrays it would be 0.013.
    assert verdicts(now, before)["spiel", "target"] == SAME


def test_other_libraries_and_backends_are_said():
    def made(peft, backend):
        packages = {**ENVIRONMENT.packages, "peft": peft}
        environment = dataclasses.replace(ENVIRONMENT, packages=packages)
        return [run("spiel", seed=s, environment=environment, backend=backend) for s in (0, 1)]

    assert judgement.versions(made("2", "blocked"), made("1", "compiled")) == [
        "peft: 1 before, 2 now.",
        "backend of spiel: compiled before, blocked now.",
    ]
    assert judgement.versions(both(), both()) == []


def test_other_weights_of_the_model_are_said():
    before, now = ([run("lora", loaded={"model weights": of})] for of in ("old", "new"))
    assert judgement.versions(now, before) == ["model weights: old before, new now."]


def test_other_items_are_refused(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    fewer = [
        dataclasses.replace(
            each,
            scores={
                **each.scores,
                "t": dataclasses.replace(each.scores["t"], doc_ids=tuple(range(1, ITEMS + 1))),
            },
        )
        for each in both()
    ]
    keep(tmp_path / "now", fewer)
    assert command(tmp_path) == 1
    assert "different test items" in capsys.readouterr().out
    assert "different test items" in (tmp_path / "now" / "tables" / "small-gate.md").read_text()


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """The code that is judged is that of the records."""
    monkeypatch.setattr(provenance, "code_hash", lambda: ENVIRONMENT.code_hash)


def keep(out, records):
    for each in records:
        (of,) = plan(small_suite(), [each.method_name], [each.seed])
        record.write(each, of.record_path(out))


def command(folder, *more, **changes):
    from suites.catalog import SUITES

    SUITES["small"] = small_suite(**changes)
    try:
        where = ["--out", str(folder / "now"), "--against", str(folder / "kept")]
        return gate.main(["small", *where, *more])
    finally:
        del SUITES["small"]


def test_the_command_passes_and_fails(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both())
    assert command(tmp_path) == 0
    assert "0 of 18 measures got worse" in capsys.readouterr().out
    keep(tmp_path / "now", both(spiel={"num_right": 20}))
    assert command(tmp_path) == 1
    assert "1 of 18 measures got worse" in capsys.readouterr().out
    written = (tmp_path / "now" / "tables" / "small-gate.md").read_text()
    assert "| spiel    | target" in written
    assert "WORSE" in written
    assert command(tmp_path, "--methods", "lora") == 0
    keep(tmp_path / "now", both(spiel={"seconds": 9.0}))
    assert command(tmp_path, "--methods", "spiel") == 1  # beside LoRA, though it was not named


def test_what_was_not_run_fails(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both()[:-1])
    assert command(tmp_path) == 1
    said = "spiel seed 1: kept, but no longer run"
    assert said in capsys.readouterr().out.splitlines()
    assert said in (tmp_path / "now" / "tables" / "small-gate.md").read_text().splitlines()


def test_why_a_cell_failed_is_said(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    failed = Record.of(cell("spiel", seed=1), "failed", "RuntimeError: no kernel", record.now())
    keep(tmp_path / "now", [*both()[:-1], failed])
    assert command(tmp_path) == 1
    said = "spiel seed 1: failed: RuntimeError: no kernel"
    assert said in capsys.readouterr().out.splitlines()


def test_results_of_other_code_fail(tmp_path, capsys, monkeypatch):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both())
    monkeypatch.setattr(provenance, "code_hash", lambda: "other")
    monkeypatch.setattr(provenance, "git_revision", lambda: "f" * 40)
    assert command(tmp_path) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert "theirs was of revision 0123456789ab, this is of ffffffffffff, or either was" in printed
    monkeypatch.setattr(provenance, "code_hash", lambda: ENVIRONMENT.code_hash)
    assert command(tmp_path) == 0  # a commit that changes no code


def test_what_a_search_picked_is_judged_at_its_own_tuning(tmp_path, capsys):
    picked = Tuning(lr=0.5, weight_decay=0.0)
    for folder, num_right in {"kept": 30, "now": 10}.items():
        for method in ("lora", "spiel"):
            for of in plan(small_suite(), [method], [0, 1], {method: picked}):
                made = run(method, num_right if method == "spiel" else 30, seed=of.seed)
                values = {"tuning": dataclasses.asdict(picked), "cell_hash": of.hash}
                record.write(dataclasses.replace(made, **values), of.record_path(tmp_path / folder))
    assert command(tmp_path, tunings={}) == 1
    assert "1 of 18 measures got worse" in capsys.readouterr().out


def test_several_kept_records_of_one_cell_are_bad_input(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    other = cell("spiel", seed=1).record_path(tmp_path / "kept").with_name("spiel-r2-lr5-s1.json")
    record.write(run("spiel", seed=1), other)
    with pytest.raises(SystemExit) as ended:
        command(tmp_path)
    assert ended.value.code == 2
    assert "several records of spiel seed 1" in " ".join(capsys.readouterr().err.split())


def test_a_longer_path_in_an_adapter_is_no_larger_adapter():
    now = both()
    for index, each in enumerate(now):
        size = dataclasses.replace(each.size, artifact_bytes=70_000 + (500 if index > 1 else 0))
        now[index] = dataclasses.replace(each, size=size)
    before = [
        dataclasses.replace(each, size=dataclasses.replace(each.size, artifact_bytes=70_000))
        for each in now
    ]
    assert verdicts(now, before)["spiel", "artifact MiB"] == SAME


def test_a_damaged_record_fails(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both())
    damaged = cell("spiel", seed=1).record_path(tmp_path / "now")
    damaged.write_text("{")
    assert command(tmp_path) == 1
    assert f"not judged: {damaged}" in capsys.readouterr().out


def test_a_method_that_the_suite_lost_fails(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both())
    tunings = {"lora": small_suite().tunings["lora"]}
    assert command(tmp_path, tunings=tunings) == 1
    printed = capsys.readouterr().out
    assert "spiel seed 0: kept, but no longer run" in printed
    assert "lora seed 0" not in printed
    assert command(tmp_path, "--methods", "lora", tunings=tunings) == 0


def test_seeds_that_the_suite_lost_fail(tmp_path, capsys):
    keep(tmp_path / "kept", both(seeds=(0, 1, 2)))
    keep(tmp_path / "now", both(seeds=(0,)))
    assert command(tmp_path, seeds=(0,)) == 1
    printed = capsys.readouterr().out
    assert "lora seed 2: kept, but no longer run" in printed
    assert "2 of 18 measures got worse" in printed


def test_what_was_kept_beside_the_suites_own_is_judged(tmp_path, capsys):
    (extra,) = plan(small_suite(), ["lora-bf16"], [7])
    for folder, seconds in {"kept": 0.1, "now": 0.2}.items():
        keep(tmp_path / folder, both(seeds=(0, 1, 7)))
        record.write(finished(extra, seconds=seconds), extra.record_path(tmp_path / folder))
    assert command(tmp_path) == 0
    assert (
        "NOT JUDGED: step time x lora of lora-bf16; train peak MiB of lora-bf16."
        in capsys.readouterr().out
    )
    extra.record_path(tmp_path / "now").unlink()
    assert command(tmp_path) == 1
    assert "lora-bf16 seed 7: kept, but no longer run" in capsys.readouterr().out


def test_one_seed_by_choice_is_said_not_to_judge_costs(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    keep(tmp_path / "now", both(spiel={"seconds": 9.0}))
    assert command(tmp_path, "--seeds", "0") == 0
    said = "NOT JUDGED: train peak MiB of lora, spiel; step time x lora of spiel."
    assert said in capsys.readouterr().out.splitlines()
    assert command(tmp_path) == 1
    assert "NOT JUDGED" not in capsys.readouterr().out


def test_a_kept_method_without_an_ok_cell_is_bad_input(tmp_path, capsys):
    failed = [Record.of(cell("spiel", seed=s), "failed", "why", record.now()) for s in (0, 1)]
    keep(tmp_path / "kept", [*both()[:2], *failed])
    keep(tmp_path / "now", both())
    with pytest.raises(SystemExit) as ended:
        command(tmp_path)
    assert ended.value.code == 2
    assert "no ok records of spiel to judge by" in capsys.readouterr().err
    assert command(tmp_path, "--methods", "lora") == 0


def test_a_kept_file_that_is_no_record_is_bad_input(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    damaged = cell("spiel", seed=1).record_path(tmp_path / "kept")
    damaged.write_text("{")
    with pytest.raises(SystemExit) as ended:
        command(tmp_path)
    assert ended.value.code == 2
    assert f"{damaged}: not readable as JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no ok records of base, full, lora, spiel to judge by in"),
        (["--methods", "spiel,lorra"], "unknown method 'lorra'; choose from lora"),
        (["--seeds", "x"], "--seeds: 'x'"),
        (["--agianst", "x"], "unknown argument '--agianst'; nearest: --against"),
    ],
)
def test_bad_input_is_one_line(tmp_path, arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        command(tmp_path, *arguments)
    assert ended.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_method_asked_for_must_have_been_kept(tmp_path, capsys):
    keep(tmp_path / "kept", both())
    with pytest.raises(SystemExit):
        command(tmp_path, "--methods", "lora,full")
    assert "no ok records of full to judge by" in capsys.readouterr().err


def test_seeds_that_only_lora_was_kept_with_are_not_missed(tmp_path, capsys):
    keep(tmp_path / "kept", [*both(), run("lora", seed=2)])
    keep(tmp_path / "now", both())
    assert command(tmp_path, "--methods", "spiel") == 0
