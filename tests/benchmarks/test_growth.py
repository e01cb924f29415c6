"""How time and memory grow with density, tokens and width, drawn in results/speed/growth.png.

Time is the median step without a growth window, as a ratio to the frozen floor's in the same
rounds; the dashed line adds the share of reselections. Memory is exact: what autograd keeps, the
optimizer's state, the trained weights, their gradients and their indices.
"""

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from suites.measure import optimizer_state_bytes, saved_for_backward_bytes
from suites.provenance import environment
from tests.benchmarks.conftest import PERIOD, QUIET, Race, Setting

pytestmark = pytest.mark.timeout(3600)

FOLDER = Path(__file__).parents[2] / "results" / "speed"
NAMES = ("frozen", "lora", "spiel")
#: Less than LoRA of rank 1 has.
TOO_FEW_FOR_LORA = "0.001"
#: Shows the reselection's share too.
WHOLE_PERIODS = 3 * PERIOD
#: Axis -> its settings, and the rounds of each.
AXES = {
    "density": (
        [Setting(budget=text) for text in (TOO_FEW_FOR_LORA, "0.003", "0.01", "0.03", "0.1")],
        WHOLE_PERIODS,
    ),
    "tokens": ([Setting(batch_size=size) for size in (1, 2, 4, 8)], PERIOD),
    "width": ([Setting(width=width) for width in (256, 512, 1024)], PERIOD),
}


@pytest.fixture(scope="module")
def grown():
    rows = [
        row
        for axis, (settings, num_rounds) in AXES.items()
        for setting in settings
        for row in measured(axis, setting, num_rounds)
    ]
    return pd.DataFrame(rows)


def measured(axis, setting, num_rounds):
    has_lora = setting.budget != TOO_FEW_FOR_LORA
    race = Race([name for name in NAMES if has_lora or name != "lora"], setting)
    for _ in range(num_rounds):
        race.round()
    at = {
        "density": float(setting.budget) if axis == "density" else None,
        "tokens": setting.batch_size * setting.sequence,
        "width": setting.width,
    }[axis]
    for name, runner in race.runners.items():
        yield {
            "axis": axis,
            "at": at,
            "method": name,
            "time_to_frozen": round(race.ratio(name, "frozen", QUIET), 3),
            "reselection_share": round(race.reselection(name)[1], 3)
            if name == "spiel" and num_rounds == WHOLE_PERIODS
            else None,
            "memory_mib": round(held_bytes(runner) / 2**20, 2),
        }


def held_bytes(runner):
    """What training holds beside the model's own weights."""
    trained = [p for p in runner.model.parameters() if p.requires_grad]
    indices = [b for name, b in runner.model.named_buffers() if ".spiel_indices." in name]
    state = 0 if runner.optimizer is None else optimizer_state_bytes(runner.optimizer)
    own = sum(2 * p.nbytes for p in trained) + sum(b.nbytes for b in indices)
    return saved_for_backward_bytes(runner.model, runner.inputs) + state + own


def test_growth(benchmark, grown):
    machine = environment("cpu", 1)
    FOLDER.mkdir(parents=True, exist_ok=True)
    label = f"{machine.cpu}, {machine.num_cpus} cores"
    grown.assign(machine=label).to_csv(FOLDER / "growth.csv", index=False)
    draw(grown, label, FOLDER / "growth.png")
    print(grown.to_string())
    race = Race(NAMES)
    benchmark.pedantic(race.runners["spiel"].step, rounds=5)
    benchmark.extra_info["rows"] = grown.to_dict("records")
    spiel = grown[(grown["method"] == "spiel")].set_index(["axis", "at"])
    lora = grown[(grown["method"] == "lora")].set_index(["axis", "at"])
    small = [place for place in lora.index if place[0] != "density" or place[1] <= 0.03]
    assert (spiel["time_to_frozen"] / lora["time_to_frozen"])[small].max() < 1.1


def draw(grown, machine, path):
    """A panel a quantity and axis."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    panels = figure.subplots(2, len(AXES))
    for column, axis in enumerate(AXES):
        for row, quantity in enumerate(("time_to_frozen", "memory_mib")):
            panel = panels[row][column]
            for name in NAMES:
                own = grown[(grown["axis"] == axis) & (grown["method"] == name)]
                (line,) = panel.plot(own["at"], own[quantity], marker="o", label=name)
                if quantity == "time_to_frozen" and own["reselection_share"].notna().all():
                    mean = own[quantity] * (1 + own["reselection_share"])
                    label = f"{name}, with reselections"
                    panel.plot(own["at"], mean, "--", color=line.get_color(), label=label)
            panel.set(xscale="log", xlabel=axis, ylabel=quantity.replace("_", " "))
            panel.set_xticks(sorted(grown[grown["axis"] == axis]["at"].unique()))
            panel.xaxis.set_major_formatter("{x:g}")
            panel.minorticks_off()
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"A train step; Llama, 6 layers, 512 wide, 1024 tokens unless said ({machine})")
    figure.savefig(path, dpi=120)
