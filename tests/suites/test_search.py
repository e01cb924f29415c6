"""Searches: what is picked from a grid, what is written, and what is said of the rest."""

import dataclasses

import pandas as pd
import pytest
from filelock import FileLock

from suites import record, search
from suites.curves import curves
from suites.plan import plan_search
from suites.record import Record
from suites.suite import Tuning
from tests.suites.arena import cell, finished, small_suite, write_all


def trial(lr, seed, target, method="lora"):
    of = dataclasses.replace(cell(method, seed=seed, split="dev"), tuning=Tuning(lr))
    return of, finished(of, target=target)


def test_search_picks_the_best_mean_and_flags_an_edge():
    trials = [
        trial(lr, seed, target)
        for lr, target in [(1e-4, 0.2), (1e-3, 0.6), (1e-2, 0.5)]
        for seed in (0, 1)
    ]
    trials += [trial(lr, 0, target, "full") for lr, target in [(1e-4, 0.9), (1e-3, 0.1)]]
    found = curves([found for _, found in trials])
    picked = found[found["picked"]]
    assert list(zip(picked["method"], picked["lr"], picked["at_edge"], strict=True)) == [
        ("lora", 1e-3, False),
        ("full", 1e-4, True),
    ]
    assert "picked, at edge" in set(search.words(found)[""])


@pytest.mark.parametrize(("status", "is_at_edge"), [("failed", True), ("diverged", False)])
def test_a_rate_that_failed_for_another_reason_is_no_bound_of_the_grid(status, is_at_edge):
    good = [trial(lr, seed, 10 * lr)[1] for lr in (1e-4, 1e-3) for seed in (0, 1)]
    of, one = trial(1e-2, 0, 0.9)
    other = dataclasses.replace(of, seed=1)
    found = curves([*good, one, Record.of(other, status, "no luck", record.now())])
    (picked,) = found[found["picked"]].to_dict("records")
    assert (picked["lr"], picked["at_edge"]) == (1e-3, is_at_edge)


def test_search_writes_its_curves(tmp_path, capsys):
    trials = [trial(lr, seed, 0.5) for lr in (1e-4, 1e-3) for seed in (0, 1)]
    for of, found in trials:
        record.write(found, of.record_path(tmp_path))
    assert search.present([of for of, _ in trials], tmp_path) == 0
    written = pd.read_csv(tmp_path / "grids" / "small.csv")
    assert written["num_seeds"].tolist() == [2, 2]
    assert "dev target" in capsys.readouterr().out
    assert "picked, at edge" in (tmp_path / "grids" / "small.md").read_text()
    assert search.picks([of for of, _ in trials], tmp_path) == {"lora": Tuning(1e-4)}


def test_search_keeps_the_curves_of_methods_that_it_has_none_of(tmp_path, capsys):
    csv = tmp_path / "grids" / "small.csv"
    of_lora = [trial(lr, seed, 0.5) for lr in (1e-4, 1e-3) for seed in (0, 1)]
    assert search.present(grid(tmp_path, *of_lora), tmp_path) == 0
    assert "kept" not in capsys.readouterr().out
    before = pd.read_csv(csv)
    of_full = [trial(1e-5, seed, 0.7, "full") for seed in (0, 1)]
    assert search.present(grid(tmp_path, *of_full), tmp_path) == 0
    assert "kept from before: lora" in capsys.readouterr().out
    written = pd.read_csv(csv)
    assert written["method"].tolist() == ["lora", "lora", "full"]
    pd.testing.assert_frame_equal(written.head(2), before)
    assert "| lora " in csv.with_suffix(".md").read_text()
    better = [trial(1e-4, seed, 0.9) for seed in (0, 1)]
    assert search.present(grid(tmp_path, *better), tmp_path) == 0
    written = pd.read_csv(csv).set_index("method")["target"]
    assert written.to_dict() == {"full": 0.7, "lora": 0.9}


def test_search_overwrites_no_curves_of_another_version(tmp_path, capsys):
    csv = tmp_path / "grids" / "small.csv"
    record.write_whole("method,lr\nfull,0.1\n", csv)
    assert search.present(grid(tmp_path, trial(1e-4, 0, 0.5)), tmp_path) == 1
    assert "small.csv was written by another version" in capsys.readouterr().out
    assert csv.read_text() == "method,lr\nfull,0.1\n"


def test_grids_that_cannot_be_written_are_said(tmp_path, capsys):
    cells = grid(tmp_path, trial(1e-4, 0, 0.5))
    (tmp_path / "grids").write_text("a file in the way")
    assert search.present(cells, tmp_path) == 1
    assert "the grids cannot be written" in capsys.readouterr().out


def diverged(lr, seed):
    of, _ = trial(lr, seed, 0.0)
    return of, Record.of(of, "diverged", "the loss is nan at step 3", record.now())


def grid(out, *trials):
    write_all([found for _, found in trials], [of for of, _ in trials], out)
    return [of for of, _ in trials]


def test_search_picks_no_tuning_that_diverged_with_a_seed(tmp_path, capsys):
    good = [trial(1e-3, seed, 0.5) for seed in (0, 1)]
    cells = grid(tmp_path, *good, trial(1e-2, 0, 0.9), diverged(1e-2, 1))
    assert search.present(cells, tmp_path) == 1
    assert "not eligible" in capsys.readouterr().out
    written = pd.read_csv(tmp_path / "grids" / "small.csv")
    assert written["num_ok"].tolist() == [2, 1]
    assert written["picked"].tolist() == [True, False]
    assert search.picks(cells, tmp_path) == {"lora": Tuning(1e-3)}


def test_tunings_that_may_not_be_picked_are_not_drawn(tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes").Axes
    errorbar, drawn = axes.errorbar, []

    def noted(panel, rates, *args, **kwargs):
        drawn.extend(rates)
        return errorbar(panel, rates, *args, **kwargs)

    monkeypatch.setattr(axes, "errorbar", noted)
    trials = [trial(1e-3, 0, 0.5), trial(1e-3, 1, 0.5), trial(1e-2, 0, 0.9), diverged(1e-2, 1)]
    found = curves([each for _, each in trials])
    search.draw(found, "small", tmp_path / "grid.png")
    assert drawn == [1e-3, 1e-3]  # in both panels
    search.draw(found[found["lr"] == 1e-2], "small", tmp_path / "none.png")
    assert drawn == [1e-3, 1e-3]
    assert (tmp_path / "none.png").exists()


@pytest.mark.parametrize("lack", ["missing", "damaged", "in work", "interrupted"])
def test_search_picks_nothing_while_a_trial_is_not_done(tmp_path, capsys, lack):
    lora = [trial(lr, 0, 0.5) for lr in (1e-4, 1e-3)]
    cells = grid(tmp_path, *lora, trial(1e-3, 0, 0.5, "full"))
    assert search.present(cells, tmp_path) == 0
    whole = (tmp_path / "grids" / "small.csv").read_text()
    path, lock = cells[0].record_path(tmp_path), FileLock(cells[0].lock_path(tmp_path))
    path.unlink()
    if lack == "damaged":
        path.write_text("{")
    elif lack == "interrupted":
        record.write(Record.of(cells[0], "interrupted", "stopped", record.now()), path)
    elif lack == "in work":
        cells[0].lock_path(tmp_path).parent.mkdir(parents=True)
        lock.acquire()
    capsys.readouterr()
    assert search.present(cells, tmp_path) == 1
    assert search.picks(cells, tmp_path) == {"full": Tuning(1e-3)}
    lock.release()
    printed = capsys.readouterr().out.splitlines()
    assert "lora: no tuning is picked, as trials are not done (1 of 2)" in printed
    assert "grids:   not written, as trials are not done" in printed
    assert (tmp_path / "grids" / "small.csv").read_text() == whole


def test_search_says_why_it_picks_nothing(tmp_path, capsys):
    cells = grid(tmp_path, diverged(1e-3, 0), diverged(1e-3, 1))
    assert search.present(cells, tmp_path) == 1
    assert "lora: no tuning is picked, as all its trials failed" in capsys.readouterr().out
    assert not (tmp_path / "grids").exists()
    cells = grid(tmp_path, trial(1e-3, 0, 0.5), diverged(1e-3, 1))
    assert search.present(cells, tmp_path) == 1
    assert "lora: no tuning is picked, as none is ok with every seed" in capsys.readouterr().out
    assert search.picks(cells, tmp_path) == {}
    full = trial(1e-3, 0, 0.5, "full")
    cells = grid(tmp_path, diverged(1e-3, 0), full)  # a method without a score is drawn too
    assert search.present(cells, tmp_path) == 1
    assert search.picks(cells, tmp_path) == {"full": Tuning(1e-3)}


def test_search_draws_its_curves(tmp_path):
    pytest.importorskip("matplotlib")
    trials = [trial(lr, seed, 0.5 + lr)[1] for lr in (1e-4, 1e-3, 1e-2) for seed in (0, 1)]
    search.draw(curves(trials), "small", tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_search_picks_the_smallest_rate_that_dev_cannot_tell_from_the_best():
    targets = {1e-4: (0.50, 0.50), 1e-3: (0.69, 0.71), 1e-2: (0.65, 0.77)}
    trials = [
        trial(lr, seed, target)[1]
        for lr, pair in targets.items()
        for seed, target in enumerate(pair)
    ]
    found = curves(trials)
    assert found["lr"][found["target"].idxmax()] == 1e-2
    assert found["lr"][found["picked"]].tolist() == [1e-3]


def test_a_pick_has_its_weight_decay(tmp_path):
    suite = small_suite(grids={"lora": (Tuning(0.1, 3.0),)})
    cells = plan_search(suite, ["lora"], [0])
    write_all([finished(each) for each in cells], cells, tmp_path)
    assert search.picks(cells, tmp_path) == {"lora": Tuning(0.1, 3.0)}


def test_of_two_decays_at_one_rate_the_better_is_picked():
    trials = [
        dataclasses.replace(trial(0.1, seed, target)[1], tuning={"lr": 0.1, "weight_decay": decay})
        for decay, targets in ((0.0, (0.71, 0.81)), (1.0, (0.75, 0.85)), (2.0, (0.5, 0.6)))
        for seed, target in enumerate(targets)
    ]
    frame = curves(trials)
    assert frame[frame["picked"]]["weight_decay"].tolist() == [1.0]
