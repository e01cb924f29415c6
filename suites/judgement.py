"""What changed between two sets of records of the same cells, and which changes count as worse."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from suites import report, stats
from suites.record import Record
from suites.report import BASELINE, ROLES
from suites.report import MixedRecordsError as MixedRecordsError

BETTER, SAME, WORSE, UNJUDGED = "better", "same", "WORSE", "-"

#: What is let pass: of a role's mean accuracy, of step time and peak memory beside LoRA's, and of
#: sizes, which are exact but for paths in an adapter's config.
SCORE_LIMIT, COST_LIMIT, SIZE_LIMIT = 0.01, 0.05, 0.001

SIZES = ("saved_for_backward_bytes", "optimizer_state_bytes", "artifact_bytes")
MIB = 2**20

NOTE = (
    f"WORSE: target or retention fell by more than {SCORE_LIMIT:g}, the 95 % interval of the "
    "difference, paired by item and seed, lying below 0; step time or peak memory of training, as "
    f"a ratio to {BASELINE}'s with the same seed, rose by more than {COST_LIMIT:.0%} at the low "
    f"end of its 95 % interval over seeds; a size rose by more than {SIZE_LIMIT:.1%}; a cell is "
    "not ok that was. Costs are judged on the same hardware alone."
)


@dataclass(frozen=True)
class Finding:
    """A measure of one method before and now, in `unit`: None where it is not known."""

    method: str
    measure: str
    before: float | None
    now: float | None
    verdict: str
    unit: str = ".3f"


def judge(now: Sequence[Record], before: Sequence[Record]) -> list[Finding]:
    """Every measure of every method of `before`, in its order.

    Raises MixedRecordsError if either is of different hardware, worlds or suites, or if the tasks
    asked other items.
    """
    report.require_comparable(now)
    report.require_comparable(before)
    same_machine = _hardware(now) == _hardware(before)
    findings = []
    for method in dict.fromkeys(record.method_name for record in before):
        then, own = _ok(before, method), _ok(now, method)
        findings.append(_cells(method, own, then))
        if not own or not then:
            continue
        findings += [_score(method, role, own, then) for role in ROLES if then[0].scores_of(role)]
        findings += _costs(method, now, before, same_machine)
        findings += _sizes(method, own, then, same_machine)
    return findings


def _ok(records: Sequence[Record], method: str) -> list[Record]:
    return [each for each in records if each.method_name == method and each.status == "ok"]


def _hardware(records: Sequence[Record]) -> set[str]:
    """One or none: `require_comparable` saw to it."""
    return {each.environment.hardware for each in records if each.environment is not None}


def _cells(method: str, own: Sequence[Record], then: Sequence[Record]) -> Finding:
    lost = {each.seed for each in then} - {each.seed for each in own}
    return Finding(method, "cells ok", len(then), len(own), WORSE if lost else SAME, ".0f")


def _score(method: str, role: str, own: Sequence[Record], then: Sequence[Record]) -> Finding:
    means = [statistics.fmean(report.role_means(each, role)) for each in (then, own)]
    paired = report.item_differences(own, then, role)
    if not paired:  # no seed in common
        return Finding(method, role, *means, UNJUDGED)
    found = stats.paired_difference(paired)
    verdict = SAME
    if found.high < 0 and found.mean < -SCORE_LIMIT:
        verdict = WORSE
    elif found.low > 0 and found.mean > SCORE_LIMIT:
        verdict = BETTER
    return Finding(method, role, *means, verdict)


def _costs(
    method: str, now: Sequence[Record], before: Sequence[Record], same_machine: bool
) -> list[Finding]:
    """Step time and peak memory of training beside LoRA's, by which the machine's mood cancels."""
    if method == BASELINE:
        return []
    findings = []
    for measure, of in {"step time": report.step_seconds, "train peak": _train_peak}.items():
        own, then = _beside_lora(now, method, of), _beside_lora(before, method, of)
        change = stats.paired_ratio(own, then)
        if change is None:
            continue
        means = [statistics.fmean(ratios.values()) for ratios in (then, own)]
        margin = change.half_width or 0.0
        verdict = _verdict(change.mean - margin, change.mean + margin, COST_LIMIT)
        name = f"{measure} x {BASELINE}"
        findings.append(Finding(method, name, *means, verdict if same_machine else UNJUDGED))
    return findings


def _beside_lora(
    records: Sequence[Record], method: str, of: Callable[[Record], float | None]
) -> Mapping[int, float]:
    """Seed -> what `of` says of the method's record over what it says of LoRA's."""
    own, base = (
        {each.seed: value for each in _ok(records, name) if (value := of(each)) is not None}
        for name in (method, BASELINE)
    )
    return {seed: own[seed] / base[seed] for seed in own if base.get(seed)}


def _train_peak(record: Record) -> float | None:
    return record.phases["train"].peak_bytes if "train" in record.phases else None


def _sizes(
    method: str, own: Sequence[Record], then: Sequence[Record], same_machine: bool
) -> list[Finding]:
    findings = []
    for name in SIZES:
        means = [_mean_size(each, name) for each in (then, own)]
        if means[0] is None or means[1] is None:
            continue
        ratio = means[1] / means[0] if means[0] else 1.0 + means[1]
        verdict = _verdict(ratio, ratio, SIZE_LIMIT) if same_machine else UNJUDGED
        measure = name.removesuffix("_bytes").replace("_", " ") + " MiB"
        before, now = (mean / MIB for mean in means if mean is not None)
        findings.append(Finding(method, measure, before, now, verdict))
    return findings


def _mean_size(records: Sequence[Record], name: str) -> float | None:
    sizes = [getattr(each.size, name) for each in records if each.size is not None]
    known = [size for size in sizes if size is not None]
    return statistics.fmean(known) if known else None


def _verdict(low: float, high: float, limit: float) -> str:
    """Of a ratio between `low` and `high`, of which less is better."""
    if low > 1 + limit:
        return WORSE
    return BETTER if high < 1 - limit else SAME


def row(finding: Finding) -> dict[str, str]:
    """The finding in rounded numbers."""
    from suites.table import number

    change = None
    if finding.before is not None and finding.now is not None:
        change = finding.now - finding.before
    return {
        "method": finding.method,
        "measure": finding.measure,
        "before": number(finding.before, finding.unit),
        "now": number(finding.now, finding.unit),
        "change": number(change, f"+{finding.unit}"),
        "verdict": finding.verdict,
    }


def machines(now: Sequence[Record], before: Sequence[Record]) -> list[str]:
    """Where and by which code each was made."""
    from suites.table import where

    return [
        f"{name}: {place}"
        for name, records in {"before": before, "now": now}.items()
        for place in sorted({where(each) for each in records if each.environment})
    ]
