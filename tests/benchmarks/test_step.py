"""A whole training step: SpIEL against LoRA, SHiRA, full fine-tuning and the frozen floor.

`make bench` runs it; no other command does. Everything is a ratio to something measured in the same
rounds; the ratios are in the JSON that the command writes.
"""

import statistics

import pytest
from torch.utils.flop_counter import FlopCounterMode

from suites.measure import saved_for_backward_bytes

pytestmark = pytest.mark.timeout(1800)

PERIOD = 20  # optimizer steps from one reselection to the next
QUIET = 14  # of them without an open growth window
#: What fails as a regression. The goal is 0.90; on 2 cores it stands at 1.0 to 1.03 (2026-11-24).
MOST_OF_LORA = 1.15


@pytest.fixture(scope="module")
def timed(race):
    for _ in range(PERIOD):
        race.round()
    return race


def test_step_time(benchmark, timed):
    ratios = {
        f"{name} / {base}": round(timed.ratio(name, base), 3)
        for base in ("lora", "frozen")
        for name in timed.runners
        if name != base
    }
    benchmark.extra_info.update(ratios)
    benchmark.pedantic(timed.runners["spiel"].step, rounds=5)
    print(ratios)
    assert ratios["spiel / lora"] <= MOST_OF_LORA
    assert ratios["spiel-ma / lora"] <= MOST_OF_LORA


def test_reselection_share(benchmark, timed):
    """What growth windows and reselections add to the mean step, over the frozen floor's noise."""
    share = _above_quiet(timed.seconds["spiel"]) / _above_quiet(timed.seconds["frozen"]) - 1
    benchmark.extra_info["reselection share of a step"] = round(share, 3)
    benchmark.pedantic(timed.runners["spiel"].step, rounds=5)
    print("reselection share of a step", round(share, 3))


def _above_quiet(seconds):
    """The mean over the mean of the quicker steps, as many as have no growth window open."""
    return statistics.fmean(seconds) / statistics.fmean(sorted(seconds)[:QUIET])


def test_bytes_saved_for_backward(benchmark, race):
    saved = {
        name: saved_for_backward_bytes(runner.model, runner.inputs)
        for name, runner in race.runners.items()
    }
    ratios = {f"{name} / lora": round(saved[name] / saved["lora"], 4) for name in saved}
    benchmark.extra_info.update(ratios)
    benchmark.pedantic(race.runners["spiel"].forward, rounds=5)
    print(ratios)
    assert saved["spiel"] == saved["spiel-ma"]
    assert saved["spiel"] <= saved["lora"]


def test_flops(benchmark, race):
    counted = {}
    for name in ("frozen", "lora", "spiel", "full"):
        with FlopCounterMode(display=False) as counter:
            race.runners[name].forward().backward()
        counted[name] = counter.get_total_flops()
    ratios = {f"{name} / frozen": round(counted[name] / counted["frozen"], 4) for name in counted}
    benchmark.extra_info.update(ratios)
    benchmark.pedantic(race.runners["spiel"].forward, rounds=5)
    print(ratios)
    assert counted["full"] > counted["lora"] > counted["frozen"]
