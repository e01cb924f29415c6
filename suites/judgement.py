"""What changed between two sets of records of the same cells, and which changes count as worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from suites import report, stats
from suites.notes import machine
from suites.record import Record
from suites.report import BASELINE, MixedRecordsError
from suites.sources import ROLES
from suites.table import MIB, number

BETTER, SAME, WORSE, UNJUDGED = "better", "same", "WORSE", "-"

#: What is let pass: of a role's mean accuracy, of step time and peak memory beside LoRA's, and of
#: sizes, which are exact but for paths in an adapter's config.
SCORE_LIMIT, COST_LIMIT, SIZE_LIMIT = 0.01, 0.05, 0.001

SIZES = ("saved_for_backward_bytes", "optimizer_state_bytes", "artifact_bytes")

NOTE = (
    f"WORSE: target or retention fell by more than {SCORE_LIMIT:g}, the 95 % interval of the "
    "difference, paired by item and seed, lying below 0; step time or peak memory of training, as "
    f"a ratio to {BASELINE}'s with the same seed, rose by more than {COST_LIMIT:.0%} at the low "
    f"end of its 95 % interval over seeds; a size rose by more than {SIZE_LIMIT:.1%}; a cell is "
    "not ok that was, or was kept but is no longer run; a measure is missing that was there, or "
    f"has too few seeds left. Costs are judged on the same hardware alone, time and peak by two "
    f"seeds at least, and {BASELINE}'s own not at all."
)

#: What `_costs` measures, and its plain name.
COSTS = {f"step time x {BASELINE}": "time", f"train peak x {BASELINE}": "memory"}


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

    Raises MixedRecordsError if either is of different hardware, if they are of different worlds or
    suites, or if the tasks asked other items.
    """
    report.require_comparable(now)
    report.require_comparable(before)
    if len(worlds := {each.world for each in (*now, *before) if each.status == "ok"}) > 1:
        raise MixedRecordsError(
            f"the embedded world is another ({', '.join(sorted(map(str, worlds)))}), as it is with "
            "other libraries: keep a new run"
        )
    same_machine = _hardware(now) == _hardware(before)
    findings = []
    for method in dict.fromkeys(record.method_name for record in before):
        then, own = _ok(before, method), _ok(now, method)
        findings.append(_cells(method, now, before))
        if not own or not then:
            continue
        findings += [_score(method, role, own, then) for role in ROLES if then[0].scores_of(role)]
        if method != BASELINE:
            findings += _costs(method, now, before, same_machine)
        findings += _sizes(method, own, then, same_machine)
    return findings


def _ok(records: Sequence[Record], method: str) -> list[Record]:
    return [each for each in records if each.method_name == method and each.status == "ok"]


def _hardware(records: Sequence[Record]) -> set[str]:
    """One or none: `require_comparable` saw to it."""
    return {each.environment.hardware for each in records if each.status == "ok"}


def _cells(method: str, now: Sequence[Record], before: Sequence[Record]) -> Finding:
    """Worse where a seed is not ok that was, or not there that was kept."""
    own, then = _ok(now, method), _ok(before, method)
    lost = _seeds(then, method) - _seeds(own, method)
    lost |= _seeds(before, method) - _seeds(now, method)
    return Finding(method, "cells ok", len(then), len(own), WORSE if lost else SAME, ".0f")


def _seeds(records: Sequence[Record], method: str) -> set[int]:
    return {each.seed for each in records if each.method_name == method}


def _score(method: str, role: str, own: Sequence[Record], then: Sequence[Record]) -> Finding:
    """Over the seeds that both have."""
    own, then = _shared(own, then), _shared(then, own)
    before, now = (report.mean(report.role_means(each, role)) for each in (then, own))
    if now is None or before is None:
        return Finding(method, role, before, now, WORSE if then else UNJUDGED)
    found = stats.paired_difference(*report.item_differences(own, then, role))
    verdict = SAME
    if found.high < 0 and found.mean < -SCORE_LIMIT:
        verdict = WORSE
    elif found.low > 0 and found.mean > SCORE_LIMIT:
        verdict = BETTER
    return Finding(method, role, before, now, verdict)


def _shared(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    seeds = {each.seed for each in others}
    return [each for each in records if each.seed in seeds]


def _costs(
    method: str, now: Sequence[Record], before: Sequence[Record], same_machine: bool
) -> list[Finding]:
    """Step time and peak memory of training beside LoRA's, by which the machine's mood cancels."""
    findings = []
    for measure, of in zip(COSTS, (report.step_seconds, report.train_peak_bytes), strict=True):
        then, own = _beside_lora(before, method, of), _beside_lora(now, method, of)
        seeds = then.keys() & own.keys()
        means = [report.mean(ratios[seed] for seed in seeds) for ratios in (then, own)]
        verdict = UNJUDGED
        if not seeds and then:
            verdict = WORSE
        elif same_machine and len(seeds) > 1:
            verdict = _ratio_verdict(own, then)
        elif same_machine and len(then) > 1:
            verdict = WORSE
        findings.append(Finding(method, measure, *means, verdict))
    return findings


def _ratio_verdict(own: Mapping[int, float], then: Mapping[int, float]) -> str:
    change = stats.paired_ratio(own, then)
    assert change is not None and change.half_width is not None
    low, high = change.mean - change.half_width, change.mean + change.half_width
    return _verdict(low, high, COST_LIMIT)


def _beside_lora(
    records: Sequence[Record], method: str, of: Callable[[Record], float | None]
) -> Mapping[int, float]:
    """Seed -> what `of` says of the method's record over what it says of LoRA's; neither is 0."""
    own, base = (report.by_seed(records, name, of) for name in (method, BASELINE))
    return {seed: own[seed] / base[seed] for seed in own if own[seed] and base.get(seed)}


def _sizes(
    method: str, own: Sequence[Record], then: Sequence[Record], same_machine: bool
) -> list[Finding]:
    findings = []
    for name in SIZES:
        before, now = (_mean_size(each, name) for each in (then, own))
        if before is None:
            continue
        verdict = UNJUDGED
        if now is None:
            verdict = WORSE
        elif same_machine:
            ratio = now / before if before else 1.0 + now
            verdict = _verdict(ratio, ratio, SIZE_LIMIT)
        measure = name.removesuffix("_bytes").replace("_", " ") + " MiB"
        sizes = [None if size is None else size / MIB for size in (before, now)]
        findings.append(Finding(method, measure, *sizes, verdict))
    return findings


def _mean_size(records: Sequence[Record], name: str) -> float | None:
    return report.mean(getattr(each.size, name) for each in records if each.size is not None)


def _verdict(low: float, high: float, limit: float) -> str:
    """Of a ratio between `low` and `high`, of which less is better."""
    if low > 1 + limit:
        return WORSE
    return BETTER if high < 1 - limit else SAME


def row(finding: Finding) -> dict[str, str]:
    """The finding in rounded numbers."""
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


def notes(findings: Sequence[Finding]) -> list[str]:
    """What the verdicts mean, and which methods have costs without one."""
    missing = []
    for measure, name in COSTS.items():
        methods = [
            each.method for each in findings if each.measure == measure and each.verdict == UNJUDGED
        ]
        if methods:
            missing.append(f"{name} of {', '.join(methods)}")
    return [NOTE, f"NOT JUDGED: {'; '.join(missing)}."] if missing else [NOTE]


def machines(now: Sequence[Record], before: Sequence[Record]) -> list[str]:
    """Where and by which code each was made, and how steady the machine was."""
    return [
        f"{name}: {note}"
        for name, records in {"before": before, "now": now}.items()
        for note in machine(records)
    ]
