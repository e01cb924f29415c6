"""The whole way, through the command line: the quickstart with few steps and few questions."""

import csv
import os
import subprocess
import sys

from suites.record import read

METHODS = ("base", "full", "lora", "spiel")


def quickstart(out, cache):
    arguments = ["quickstart", "--methods", ",".join(METHODS), "--seeds", "0", "--out", str(out)]
    # Not the tests' one thread: pretraining the world uses all cores.
    own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "suites.run", *arguments, "--steps", "30", "--limit", "20"],
        env={**own, "SPIEL_CACHE": str(cache), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )


def test_quickstart_at_a_tiny_size(tmp_path):
    out, cache = tmp_path / "my results", tmp_path / "cache"
    first = quickstart(out, cache)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "[4/4] spiel seed 0: ok" in first.stderr
    name = "quickstart-steps30-limit20"
    records = {
        method: read(out / "records" / name / "world" / f"{method}-r8-s0.json")
        for method in METHODS
    }
    assert {record.status for record in records.values()} == {"ok"}
    assert records["lora"].size.matched
    assert records["spiel"].size.matched
    assert records["base"].scores["world_retention"].value > 0.9
    assert all(record.scores["world_target"].num_items == 20 for record in records.values())
    for method in ("full", "lora", "spiel"):
        losses = records[method].training.losses
        assert len(losses) == 30
        assert losses[-1] < losses[0]
    with (out / "tables" / f"{name}.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == list(METHODS)
    assert f"{out / 'tables' / name}.md" in first.stdout

    second = quickstart(out, cache)
    assert second.returncode == 0
    assert "4 of 4 cells are finished" in second.stderr
    assert "quality" in second.stdout
