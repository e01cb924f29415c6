"""The table as a figure: what each method reached, and what it took."""

from __future__ import annotations

from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd

from suites.report import BASELINE

#: Column of the table -> what its axis says, and the unit it is drawn in.
AXES = {
    "target": ("target", 1.0),
    "retention": ("retention", 1.0),
    f"step_ratio_to_{BASELINE}": (f"time of a step / {BASELINE}'s", 1.0),
    "step_seconds": ("time of a step (ms)", 1e-3),
    "train_peak_bytes": ("peak memory of training (MiB)", 2.0**20),
}

#: Told apart without colours too.
MARKERS = "osD^v<>PXp*hd"


def draw(frame: pd.DataFrame, name: str, stem: Path) -> list[Path]:
    """Writes `<stem>.png` and, for a paper, `.pdf`: a point a method, with 95 % intervals.

    Writes nothing where matplotlib (the extra `report`) is not installed, or there is nothing to
    draw.
    """
    panels = _panels(frame)
    if find_spec("matplotlib") is None or not panels:
        return []
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.5 + 4.2 * len(panels), 4), layout="constrained")
    drawn: dict[str, Any] = {}
    for panel, (x, y) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        drawn |= _scatter(panel, frame, x, y)
    figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False)
    figure.suptitle(f"{name}: mean over seeds, 95 % interval")
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def _panels(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of columns that some method has both of: quality, then cost."""
    ratio = f"step_ratio_to_{BASELINE}"
    time = ratio if frame[ratio].notna().any() else "step_seconds"
    quality = ("target", "retention") if frame["retention"].notna().any() else (time, "target")
    return [
        pair
        for pair in (quality, (time, "train_peak_bytes"))
        if frame[list(pair)].notna().all(axis="columns").any()
    ]


def _scatter(panel: Any, frame: pd.DataFrame, x: str, y: str) -> dict[str, Any]:
    """Draws the methods that have both columns; method -> what stands for it in the legend.

    A method looks the same in every panel.
    """
    handles = {}
    for (index, row), marker in zip(frame.reset_index().iterrows(), cycle(MARKERS), strict=False):
        if row[[x, y]].notna().all():
            values = [row[axis] / AXES[axis][1] for axis in (x, y)]
            across, along = (_half_width(row, axis) for axis in (x, y))
            handles[row["method"]] = panel.errorbar(
                *values, xerr=across, yerr=along, fmt=marker, color=f"C{index % 10}", capsize=2
            )
    panel.set(xlabel=AXES[x][0], ylabel=AXES[y][0])
    panel.grid(alpha=0.3)
    return handles


def _half_width(row: pd.Series, axis: str) -> float:
    """Half the 95 % interval in the axis's unit; 0 where it is not known."""
    width = row.get(f"{axis}_ci95")
    return 0.0 if width is None or pd.isna(width) else float(width) / AXES[axis][1]
