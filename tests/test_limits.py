"""A kept run of `make bench` sets the limits of later ones on such a CPU."""

import json

import pytest

from suites.provenance import cpu_name
from tests.benchmarks import limits


@pytest.mark.parametrize(("cpu", "expected"), [(cpu_name(), 1.1), ("another", 1.0)])
def test_a_kept_run_sets_the_limit(cpu, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "KEPT", tmp_path / "benchmarks.json")
    assert limits.most("spiel / lora", 1.0) == pytest.approx(1.05)
    kept = {"benchmarks": [{"extra_info": {"cpu": cpu, "spiel / lora": 1.1}}, {"extra_info": {}}]}
    limits.KEPT.write_text(json.dumps(kept))
    assert limits.most("spiel / lora", 1.0) == pytest.approx(1.05 * expected)
    assert limits.most("spiel-ma / lora", 1.0) == pytest.approx(1.05)
