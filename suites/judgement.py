"""What changed between two sets of records of the same cells, and which changes count as worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from suites import report, stats
from suites.notes import machine
from suites.record import Record
from suites.report import BASELINE, MixedRecordsError
from suites.sources import ROLES
from suites.table import MIB, number
from suites.values import given

BETTER, SAME, UNSURE, WORSE, UNJUDGED = "better", "same", "unsure", "WORSE", "-"

#: What is let pass: of a role's mean accuracy, of step time and peak memory, and of sizes, which
#: are exact but for so many bytes of paths in an adapter's config and card.
SCORE_LIMIT, COST_LIMIT, SIZE_LIMIT, PATHS = 0.01, 0.05, 0.001, 2048

#: Of two-sided intervals. Whether something got worse asks for one side alone, and is answered
#: with 95 % confidence by the end of an interval of 90 %.
CONFIDENCE = 0.9

TIME, PEAK = f"step time x {BASELINE}", "train peak MiB"

#: What is never judged.
SHOWN = "step time ms"

#: Fields of Size -> what they are called here, and how many of them are one of its units.
SIZES = {
    "num_trainable": ("trained weights", 1),
    "saved_for_backward_bytes": ("saved for backward MiB", MIB),
    "optimizer_state_bytes": ("optimizer state MiB", MIB),
    "artifact_bytes": ("artifact MiB", MIB),
}

NOTE = (
    f"WORSE, with 95 % confidence over seeds: target or retention fell (paired by item and seed), "
    f"and by more than {SCORE_LIMIT:g}; step time, as a ratio to {BASELINE}'s with the same seed, "
    f"or peak memory of training rose by more than {COST_LIMIT:.0%}. Or for certain: a size rose "
    f"by more than {SIZE_LIMIT:.1%}; a cell is not ok that was, or was kept but is no longer run; "
    "a measure is missing that was there. unsure: the mean is past that limit, and the seeds or "
    "items are too few or differ too much to tell. Time and peak are judged on the same hardware "
    f"alone, by two seeds at least, and {BASELINE}'s time not at all."
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

    Raises MixedRecordsError if they are of different worlds or suites, or if the tasks asked other
    items.
    """
    report.require_comparable(now)
    report.require_comparable(before)
    if len(worlds := {each.world for each in (*now, *before) if each.status == "ok"}) > 1:
        raise MixedRecordsError(
            f"the embedded world is another ({', '.join(sorted(map(str, worlds)))}), as it is with "
            "other libraries or other code that makes it: keep a new run"
        )
    same_machine = len(report.hardware([*now, *before])) == 1
    findings = []
    for method in dict.fromkeys(record.method_name for record in before):
        then, own = _ok(before, method), _ok(now, method)
        findings.append(_cells(method, now, before))
        if not own or not then:
            continue
        findings += [_score(method, role, own, then) for role in ROLES if then[0].scores_of(role)]
        findings.append(_time(method, now, before, same_machine))
        findings.append(_peak(method, own, then, same_machine))
        findings += _sizes(method, own, then)
    return findings


def _ok(records: Sequence[Record], method: str) -> list[Record]:
    return [each for each in records if each.method_name == method and each.status == "ok"]


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
    differences = report.item_differences(own, then, role)
    found = stats.paired_difference(*differences, confidence=CONFIDENCE)
    verdict = SAME
    is_sure = found.p_value is not None and found.p_value < 1 - CONFIDENCE
    if found.mean < -SCORE_LIMIT:
        verdict = WORSE if is_sure else UNSURE
    elif is_sure and found.mean > SCORE_LIMIT:
        verdict = BETTER
    return Finding(method, role, before, now, verdict)


def _shared(records: Sequence[Record], others: Sequence[Record]) -> list[Record]:
    seeds = {each.seed for each in others}
    return [each for each in records if each.seed in seeds]


def _time(
    method: str, now: Sequence[Record], before: Sequence[Record], same_machine: bool
) -> Finding:
    """Beside LoRA's, by which the machine's mood cancels; LoRA's own is shown and not judged."""
    if method == BASELINE:
        then, own = (_mean(report.by_seed(each, method, _milliseconds)) for each in (before, now))
        return Finding(method, SHOWN, then, own, UNJUDGED)
    return _cost(
        method, TIME, _beside_lora(now, method), _beside_lora(before, method), same_machine
    )


def _milliseconds(record: Record) -> float | None:
    seconds = report.step_seconds(record)
    return None if seconds is None else 1e3 * seconds


def _beside_lora(records: Sequence[Record], method: str) -> dict[int, float]:
    """Seed -> the method's step time over LoRA's; neither is 0."""
    own, base = (report.by_seed(records, name, report.step_seconds) for name in (method, BASELINE))
    return {seed: own[seed] / base[seed] for seed in own if own[seed] and base.get(seed)}


def _peak(
    method: str, own: Sequence[Record], then: Sequence[Record], same_machine: bool
) -> Finding:
    return _cost(method, PEAK, _peaks(own, method), _peaks(then, method), same_machine)


def _peaks(records: Sequence[Record], method: str) -> dict[int, float]:
    """Seed -> MiB, where they are not 0."""
    found = report.by_seed(records, method, report.train_peak_bytes)
    return {seed: num_bytes / MIB for seed, num_bytes in found.items() if num_bytes}


def _cost(
    method: str,
    measure: str,
    own: Mapping[int, float],
    then: Mapping[int, float],
    same_machine: bool,
) -> Finding:
    """Of a cost by seeds, now and before: over the seeds that both have."""
    seeds = then.keys() & own.keys()
    before, now = (_mean({seed: costs[seed] for seed in seeds}) for costs in (then, own))
    verdict = UNJUDGED
    if then and not own:
        verdict = WORSE
    elif same_machine and len(seeds) > 1:
        change = stats.paired_ratio(own, then, CONFIDENCE)
        assert change is not None and change.half_width is not None
        low, high = change.mean - change.half_width, change.mean + change.half_width
        verdict = _verdict(low, high, COST_LIMIT)
    return Finding(method, measure, before, now, verdict)


def _mean(costs: Mapping[int, float]) -> float | None:
    return report.mean(costs.values())


def _sizes(method: str, own: Sequence[Record], then: Sequence[Record]) -> Iterator[Finding]:
    """They hang on no machine, but what is kept for backward on the kind of device."""
    same_kind = _kinds(own) == _kinds(then)
    for name, (measure, unit) in SIZES.items():
        before, now = (_mean_size(each, name) for each in (then, own))
        if before is None:
            continue
        verdict = UNJUDGED
        if now is None:
            verdict = WORSE
        elif same_kind or name != "saved_for_backward_bytes":
            spare = SIZE_LIMIT * before + (PATHS if name == "artifact_bytes" else 0)
            verdict = WORSE if now > before + spare else BETTER if now < before - spare else SAME
        now = None if now is None else now / unit
        yield Finding(method, measure, before / unit, now, verdict, ",.0f" if unit == 1 else ".3f")


def _kinds(records: Sequence[Record]) -> set[str]:
    """`cpu` or `cuda`."""
    return {given(each.environment).device.partition(":")[0] for each in records}


def _mean_size(records: Sequence[Record], name: str) -> float | None:
    return report.mean(getattr(each.size, name) for each in records if each.size is not None)


def _verdict(low: float, high: float, limit: float) -> str:
    """Of a ratio between `low` and `high`, of which less is better."""
    if low > 1 + limit:
        return WORSE
    if (low + high) / 2 > 1 + limit:
        return UNSURE
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


def conclusion(findings: Sequence[Finding]) -> str:
    """How many got worse, and how many may have, in a line."""
    verdicts = Counter(finding.verdict for finding in findings)
    line = f"{verdicts[WORSE]} of {len(findings)} measures got worse"
    if verdicts[UNSURE]:
        line += f", {verdicts[UNSURE]} may have: more seeds or items would tell"
    return line


def notes(findings: Sequence[Finding]) -> list[str]:
    """What the verdicts mean, and what has none that might."""
    missing = report.grouped(
        (each.measure, each.method)
        for each in findings
        if each.verdict == UNJUDGED and each.measure != SHOWN
    )
    told = [f"{measure} of {', '.join(methods)}" for measure, methods in missing.items()]
    return [NOTE, f"NOT JUDGED: {'; '.join(told)}."] if told else [NOTE]


def versions(now: Sequence[Record], before: Sequence[Record]) -> list[str]:
    """What was made with other versions of libraries, models or data, or by another backend."""
    own, then = (
        report.grouped(used for each in records if each.status == "ok" for used in _used(each))
        for records in (now, before)
    )
    return [
        f"{what}: {' and '.join(then.get(what, ['none']))} before, "
        f"{' and '.join(own.get(what, ['none']))} now."
        for what in dict.fromkeys([*then, *own])
        if then.get(what) != own.get(what)
    ]


def _used(record: Record) -> Iterator[tuple[str, str]]:
    yield from given(record.environment).packages.items()
    yield from record.loaded.items()
    yield f"backend of {record.method_name}", record.backend or "none"


def machines(now: Sequence[Record], before: Sequence[Record]) -> list[str]:
    """Where and by which code each was made, and how steady the machine was."""
    return [
        f"{name}: {note}"
        for name, records in {"before": before, "now": now}.items()
        for note in machine(records)
    ]
