"""What stands below a table: what its signs mean, where it was measured, what went wrong."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from suites import report, stats
from suites.plan import Cell, stand_in
from suites.record import Record
from suites.sources import ROLES
from suites.values import given

UNMATCHED = "†"
SIGNIFICANT = "*"
TESTS = (
    f"two-way bootstrap, or below {stats.MIN_ITEMS} items sign test, and paired t test over seeds"
)
OWN = "the suite's own (--search picks them on dev)"
#: How many times as slow a machine may be at one time as at another before its table warns.
SPEED_LIMIT = 1.25


def footnotes(frame: pd.DataFrame, records: Sequence[Record]) -> list[str]:
    """What must be known to read the table, and what went wrong."""
    notes = [
        f"{metrics(records)}±: half the 95 % interval over seeds. MiB: peak of a phase, on a "
        "CPU beyond what the libraries hold; kept for the backward pass; state of the optimizer; "
        "files to keep."
    ]
    if len(report.hardware(records)) > 1:
        notes.append("Made on several kinds of hardware: what took time or memory is left out.")
    asked = {record.size.num_asked for record in records if record.size and record.size.num_asked}
    budget = f"the budget of {asked.pop():,} weights" if asked else "a budget"
    if not all(frame["matched"]):
        notes.append(f"{UNMATCHED} not matched to {budget}.")
    if frame[[f"{role}_minus_{report.BASELINE}" for role in ROLES]].notna().any(axis=None):
        notes.append(
            f"vs {report.BASELINE}: target / retention above {report.BASELINE}'s, paired by item "
            f"and by the seeds that both have; {SIGNIFICANT} p < {stats.SIGNIFICANCE:g} ({TESTS}), "
            "not corrected for the number of comparisons."
        )
    if (frame["num_ok"] == 1).any():
        notes.append("One seed has no interval; use several before any claim.")
    notes += [*unlike(records), *data(records), *prompts(records), *machine(records)]
    for row in frame.to_dict("records"):
        notes += [f"{row['method']}: {failure}" for failure in row["failures"]]
    return notes


def unlike(records: Sequence[Record]) -> list[str]:
    """What methods do not have in common, and the columns do not show."""
    decays = {each.method_name: each.tuning["weight_decay"] for each in records if each.tuning}
    trained = report.grouped(
        (" and ".join(each.size.trainable_dtypes), each.method_name)
        for each in records
        if each.size and each.size.trainable_dtypes
    )
    notes = []
    if len(set(decays.values())) > 1:
        named = ", ".join(f"{method} {decay:g}" for method, decay in decays.items())
        notes.append(f"Weight decay: {named}.")
    notes += versions(records)
    if len(trained) > 1:
        named = "; ".join(f"{dtypes}: {', '.join(methods)}" for dtypes, methods in trained.items())
        notes.append(f"Trained weights are {named}. In 16 bits small updates round to nothing.")
    return notes


def versions(records: Sequence[Record]) -> list[str]:
    """Code, libraries, attention and the like of which the records were made with several kinds."""
    used: dict[str, list[tuple[str, Record]]] = {}
    for each in records:
        for name, version in made_with(each).items():
            used.setdefault(name, []).append((version, each))
    return [
        f"Of {name} several versions: {'; '.join(told)}."
        for name, pairs in used.items()
        if len(told := _by_version(pairs)) > 1
    ]


def made_with(record: Record) -> dict[str, str]:
    """Name -> version or kind, of what a record's numbers may hang on."""
    if record.environment is None:
        return {}
    environment = record.environment
    code = environment.code_hash or environment.git_revision or "unknown"
    packages = {"python": environment.python, **environment.packages}
    return {"code": code[:12], **packages, **environment.numerics, **record.loaded}


def _by_version(pairs: Sequence[tuple[str, Record]]) -> list[str]:
    """`1 for lora, full`; the seeds too of methods that have several."""
    versions = report.grouped((each.method_name, version) for version, each in pairs)
    names = report.grouped(
        (version, each.method_name + f" seed {each.seed}" * (len(versions[each.method_name]) > 1))
        for version, each in pairs
    )
    return [f"{version} for {', '.join(methods)}" for version, methods in names.items()]


def data(records: Sequence[Record]) -> list[str]:
    """How much of the training data was left out."""
    done = [record.training for record in records if record.status == "ok" and record.tuning]
    if not done or not (done[0].num_dropped or done[0].num_truncated):
        return []
    kept, num_dropped, num_cut = done[0].num_examples, done[0].num_dropped, done[0].num_truncated
    told = []
    if num_dropped:
        told.append(
            f"{num_dropped:,} were dropped, as they are too long or nothing is to be learnt within "
            "the limit of length"
        )
    if num_cut:
        told.append(f"{num_cut:,} were cut at {'that limit' if told else 'the limit of length'}")
    return [f"Training data: of {kept + num_dropped:,} rows {', and '.join(told)}."]


def prompts(records: Sequence[Record]) -> list[str]:
    """How many prompts of which tasks had no room in the model, if any."""
    cut = report.grouped(
        (f"{score.num_cut:,} of {task}", each.method_name)
        for each in records
        for task, score in each.scores.items()
        if score.num_cut
    )
    told = [f"{what} ({', '.join(methods)})" for what, methods in cut.items()]
    begin = "Requests (one an answer) that lost their beginning, as the model has no room for more"
    return [f"{begin}: {'; '.join(told)}."] if told else []


def rates(cells: Sequence[Cell]) -> list[str]:
    """Where the learning rates are from; of a suite without grids, where not from itself."""
    trained = [cell for cell in cells if cell.entry.trains and cell.method != "frozen"]
    sources = report.grouped((_source(cell), cell.method) for cell in trained)
    if not sources or (list(sources) == [OWN] and not cells[0].suite.grids):
        return []
    told = [f"{', '.join(names)}: {source}" for source, names in sources.items()]
    edges = ", ".join(dict.fromkeys(cell.method for cell in trained if _is_at_edge(cell)))
    beyond = f" At an edge of its grid, beyond which a better one may lie: {edges}."
    return [f"Learning rates: {'; '.join(told)}.{beyond if edges else ''}"]


def _source(cell: Cell) -> str:
    rates = cell.suite.tunings
    like = stand_in(cell.method, rates)
    if cell.tuning != rates.get(like):
        return "picked on dev"
    if cell.method == like:
        return OWN
    return f"{like}'s, for want of one of their own"


def _is_at_edge(cell: Cell) -> bool:
    grid = cell.suite.grids.get(stand_in(cell.method, cell.suite.grids), ())
    found = [tuning.lr for tuning in grid]
    return bool(found) and not min(found) < given(cell.tuning).lr < max(found)


def metrics(records: Sequence[Record]) -> str:
    """`target: accuracy; retention: byte likelihood. `; nothing where there are no scores.

    Several tasks of a role are named.
    """
    said: dict[str, list[str]] = {}
    for role in ROLES:
        tasks = report.grouped(
            (_metric(score.metric), task)
            for record in records
            for task, score in record.scores.items()
            if score.role == role
        )
        named = [f"{metric} ({', '.join(names)})" for metric, names in tasks.items()]
        is_one = sum(map(len, tasks.values())) <= 1
        text = "".join(tasks) if is_one else f"mean of {', '.join(named)}"
        said.setdefault(text, []).append(role)
    phrases = [f"{', '.join(roles)}: {text}" for text, roles in said.items() if text]
    return f"{'; '.join(phrases)}. " if phrases else ""


def _metric(key: str) -> str:
    """lm-eval's `acc,none` in words."""
    name = key.partition(",")[0]
    return "accuracy" if name == "acc" else name.replace("_", " ")


def machine(records: Sequence[Record]) -> list[str]:
    """Where and by which code the records were made, and how steady the machine was."""
    places = {where(record) for record in records if record.environment}
    return [*sorted(places), *(speed(records) if len(report.hardware(records)) == 1 else [])]


def where(record: Record) -> str:
    """The machine, and the revision of the code that the record was made with."""
    environment = given(record.environment)
    revision = (environment.git_revision or "unknown")[:12]
    changed = f", changed (code {environment.code_hash[:7]})" if environment.git_dirty else ""
    return f"{environment.hardware}; revision {revision}{changed}."


def speed(records: Sequence[Record]) -> list[str]:
    """How far the machine's own speed differed between the records, if they tell; a warning where
    it was too far.
    """
    products = [
        seconds
        for record in records
        if record.status == "ok"
        for seconds in record.training.yardstick_seconds
    ]
    if not products:
        return []
    low, high = min(products), max(products)
    note = (
        f"The machine: one and the same matrix product took {1e3 * low:.3g} to {1e3 * high:.3g} ms "
        "before and after training."
    )
    if high > SPEED_LIMIT * low:
        note += (
            f" Its speed differed {high / low:.1f}-fold, and so may the run times of single cells: "
            "compare them with care, or measure again while nothing else runs."
        )
    return [note]
