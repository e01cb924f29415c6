"""What a ratio may be at most: that of a run that was kept on such a CPU, or else what SpIEL is to
reach, and a margin for noise.
"""

import json
from pathlib import Path

from suites.provenance import cpu_name

#: A copy of what `make bench` wrote.
KEPT = Path(__file__).parents[2] / "results" / "baselines" / "benchmarks.json"

MARGIN = 1.05


def kept_ratios():
    """Ratio -> its value in the kept run; none if there is no such run, or it is of another CPU."""
    if not KEPT.exists():
        return {}
    benchmarks = json.loads(KEPT.read_text())["benchmarks"]
    own = [each["extra_info"] for each in benchmarks if each["extra_info"].get("cpu") == cpu_name()]
    return {name: value for each in own for name, value in each.items()}


def most(name, goal):
    return kept_ratios().get(name, goal) * MARGIN
