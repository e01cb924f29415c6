"""Records are written whole or not at all, and read only if they are whole."""

import dataclasses
import errno
import json
import os

import pytest

from suites import record
from suites.record import DamagedRecordError, Record
from tests.suites.arena import cell, finished


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records" / "lora-r2-s0.json"


def test_round_trip(path):
    original = finished(cell())
    record.write(original, path)
    assert record.read(path) == original


def test_failed_record_round_trip(path):
    original = Record.of(cell(), "oom", "too large", record.now())
    record.write(original, path)
    assert record.read(path) == original


def test_unknown_status_is_refused():
    with pytest.raises(ValueError, match="'fine' is not one of ok, oom"):
        Record.of(cell(), "fine", "", record.now())


def test_a_finished_record_is_kept_where_one_that_is_no_better_takes_its_place(path):
    before, kept = finished(cell()), path.parent / "replaced"
    record.write(before, path)
    record.write(finished(cell(), target=0.6), path)  # run again by --force
    assert not kept.exists()
    record.write(Record.of(cell(), "interrupted", "", record.now()), path)
    (file,) = kept.iterdir()
    assert record.read(file).scores["t"].value == 0.6
    record.write(before, path)
    record.write(dataclasses.replace(before, cell_hash="of other data"), path)
    assert record.read(file) == before


def test_full_disk_leaves_no_partial_file(path, monkeypatch):
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        record.write(finished(cell()), path)
    assert list(path.parent.iterdir()) == []


def test_failed_write_keeps_the_record_before(path, monkeypatch):
    before = finished(cell(), target=0.25)
    record.write(before, path)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        record.write(finished(cell(), target=0.75), path)
    assert record.read(path) == before
    assert list(path.parent.iterdir()) == [path]


def test_what_is_not_json_is_not_written(path):
    with pytest.raises(ValueError, match="JSON"):
        record.write(finished(cell(), target=float("nan")), path)
    assert not path.exists()


def without(name):
    return lambda values: values.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("suite_hash"), "suite_hash"),
        (without("scores"), "scores"),
        (without("schema_version"), "schema_version"),
        (lambda values: values.update(schema_version=99), "schema 99, this version reads 4"),
        (lambda values: values.update(status="great"), "'great' is not one of"),
        (lambda values: values.update(surprise=1), "surprise"),
        (lambda values: values["size"].pop("num_trainable"), "num_trainable"),
        (lambda values: values.update(phases=None), "phases|NoneType"),
    ],
)
def test_damaged_values_are_named(path, damage, message):
    values = dataclasses.asdict(finished(cell()))
    damage(values)
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedRecordError, match=message) as caught:
        record.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": 1}'])
def test_damaged_files_are_named(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(DamagedRecordError, match=r"lora-r2-s0\.json"):
        record.read(path)


def test_truncated_record_is_damaged(path):
    record.write(finished(cell()), path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(DamagedRecordError):
        record.read(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"value": None}, "must be real number"),
        ({"value": float("nan")}, "a score is not finite"),
        ({"per_item": [1.0, None]}, "must be real number"),
        ({"per_item": [1.0]}, "a score of 2 items has 1 values for 2 documents"),
    ],
)
def test_a_score_that_cannot_be_is_damage(path, change, told):
    values = dataclasses.asdict(finished(cell()))
    values["scores"]["t"] |= change
    path.parent.mkdir()
    path.write_text(json.dumps(values))
    with pytest.raises(DamagedRecordError, match=told):
        record.read(path)


def test_a_finished_record_is_kept_where_force_fails_or_the_world_is_another(tmp_path):
    path = tmp_path / "lora-r2-s0.json"
    before, kept = finished(cell()), tmp_path / "replaced"
    record.write(before, path)
    record.write(Record.of(cell(), "failed", "no", record.now(), world=before.world), path)
    (file,) = kept.iterdir()
    assert record.read(file) == before
    file.unlink()
    record.write(before, path)
    record.write(dataclasses.replace(before, world="another"), path)
    (file,) = kept.iterdir()
    assert record.read(file) == before


def test_records_of_several_settings_are_kept_beside_each_other(tmp_path):
    path, kept = tmp_path / "lora-r2-s0.json", tmp_path / "replaced"
    for name in "abc":
        record.write(dataclasses.replace(finished(cell()), cell_hash=name), path)
    assert sorted(record.read(file).cell_hash for file in kept.iterdir()) == ["a", "b"]
