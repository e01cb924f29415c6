"""The embedded world: the same from the same seed, whole or not at all, and asking what it says."""

import dataclasses
import hashlib
import json
import multiprocessing
import re
import shutil
import time

import pytest

from suites import embedded_base, embedded_facts
from suites.embedded import build, is_whole
from suites.world import World


def rows(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").open()]


def hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def parts(prompt):
    """("first3 last9", 2) of "first3 last9 relation2 ->"."""
    name, relation = re.fullmatch(r"(first\d+ last\d+) relation(\d+) ->", prompt).groups()
    return name, int(relation)


def test_same_seed_same_files_wherever_they_lie(tiny_world, world_folder, tmp_path):
    again = build(tiny_world, tmp_path / "elsewhere")
    assert again.parent != world_folder.parent
    assert hashes(again) == hashes(world_folder)
    assert {"README.md", "manifest.json", "model/model.safetensors"} <= set(hashes(again))


def test_another_seed_another_world(tiny_world, world_folder):
    other = embedded_facts.splits(dataclasses.replace(tiny_world, seed=1))
    assert other["train"] != rows(world_folder, "train")


def test_a_second_build_finds_the_first(tiny_world, world_cache, world_folder, monkeypatch):
    monkeypatch.setattr(embedded_base, "pretrain", None)  # called, it would raise
    assert build(tiny_world, world_cache) == world_folder


@pytest.mark.parametrize("damage", ["changed", "missing", "extra", "no manifest", "bad manifest"])
def test_a_damaged_world_is_made_again(tiny_world, world_folder, tmp_path, damage):
    folder = shutil.copytree(world_folder, tmp_path / world_folder.name)
    assert is_whole(folder)
    match damage:
        case "changed":
            weights = folder / "model" / "model.safetensors"
            data = bytearray(weights.read_bytes())
            data[-1] ^= 1
            weights.write_bytes(bytes(data))
        case "missing":
            (folder / "data" / "train.jsonl").unlink()
        case "extra":
            (folder / "tasks" / "another.yaml").write_text("task: another\n")
        case "no manifest":
            (folder / "manifest.json").unlink()
        case "bad manifest":
            (folder / "manifest.json").write_text("{")
    assert not is_whole(folder)
    assert build(tiny_world, tmp_path) == folder
    assert hashes(folder) == hashes(world_folder)


def test_a_build_that_fails_leaves_nothing(tiny_world, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("out of luck")

    with monkeypatch.context() as patched:
        patched.setattr(embedded_base, "pretrain", fail)
        with pytest.raises(RuntimeError, match="out of luck"):
            build(tiny_world, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    assert is_whole(build(tiny_world, tmp_path))


def test_what_a_killed_build_left_is_cleared(tiny_world, world_folder, tmp_path):
    stale = tmp_path / f"{world_folder.name}.partial"
    (stale / "data").mkdir(parents=True)
    assert is_whole(build(tiny_world, tmp_path))
    assert not stale.exists()


def test_two_processes_share_one_build(tiny_world, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    started, made = context.Barrier(2), context.Value("i", 0)

    def pretrain(world, folder, report):  # no torch, which is not to be used after a fork
        with made.get_lock():
            made.value += 1
        time.sleep(0.5)

    def one():
        started.wait(30)
        build(tiny_world, tmp_path)

    monkeypatch.setattr(embedded_base, "pretrain", pretrain)
    both = [context.Process(target=one) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert made.value == 1


def test_a_cache_that_cannot_be_written_is_named(tiny_world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written to .*file.*SPIEL_CACHE"):
        build(tiny_world, tmp_path / "file")


def test_spiel_cache_is_where_worlds_lie(tiny_world, world_cache, world_folder, monkeypatch):
    monkeypatch.setenv("SPIEL_CACHE", str(world_cache))
    assert build(tiny_world) == world_folder


def test_progress_goes_from_zero_to_one(tiny_world, tmp_path):
    seen = []
    build(tiny_world, tmp_path, lambda fraction, text: seen.append(fraction))
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)


def test_train_dev_and_test_ask_different_entities():
    world = World()
    splits = embedded_facts.splits(world)
    trained = {parts(row["prompt"])[0] for row in splits["train"]}
    asked = {
        name: {parts(row["query"])[0] for row in splits[name]}
        for name in ("target_dev", "target_test", "retention_dev", "retention_test")
    }
    assert len(trained) == world.shown_fraction * world.num_entities
    assert not trained & (asked["target_dev"] | asked["target_test"])
    dev = asked["target_dev"] | asked["retention_dev"]
    test = asked["target_test"] | asked["retention_test"]
    assert not dev & test
    assert trained & asked["retention_dev"]
    assert trained & asked["retention_test"]
    for name in asked:
        assert len(splits[name]) == world.num_questions


def test_every_question_can_be_answered_from_what_was_shown():
    """By hand: find an entity's cluster from the old facts, and its new value from a fellow's."""
    splits = embedded_facts.splits(World())
    profiles, shown = {}, {}
    for row in splits["pretrain"]:
        name, relation = parts(row["prompt"])
        profiles.setdefault(name, {})[relation] = row["completion"].strip()
    for row in splits["train"]:
        name, relation = parts(row["prompt"])
        key = tuple(profiles[name].values()), relation
        assert shown.setdefault(key, row["completion"].strip()) == row["completion"].strip()
        assert profiles[name][relation] != row["completion"].strip()
    for row in splits["target_test"] + splits["target_dev"]:
        name, relation = parts(row["query"])
        assert row["choices"][row["answer"]] == shown[tuple(profiles[name].values()), relation]
        assert profiles[name][relation] not in row["choices"]
    for row in splits["retention_test"] + splits["retention_dev"]:
        name, relation = parts(row["query"])
        assert row["choices"][row["answer"]] == profiles[name][relation]


def test_choices_are_different_and_answers_are_anywhere():
    for name, split in embedded_facts.splits(World()).items():
        if name in ("pretrain", "train"):
            continue
        assert all(len(set(row["choices"])) == 8 for row in split)
        places = [row["answer"] for row in split]
        assert all(80 < places.count(place) < 160 for place in range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_entities": 0}, "num_entities must be positive, got 0"),
        ({"shown_fraction": 1.0}, r"shown_fraction 1.0 is not below 1"),
        ({"num_choices": 33}, "num_choices is 33, allowed: up to 31"),
        ({"num_changed_relations": 8}, "num_changed_relations is 8, allowed: up to 7"),
        ({"num_values": 31}, "num_clusters is 32, allowed: up to 31"),
        ({"hidden_size": 100, "num_heads": 3}, "hidden_size 100 is not a multiple"),
        ({"num_entities": 32}, "shows none of a cluster"),
    ],
)
def test_a_world_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        World(**change)


def test_retention_asks_only_what_training_does_not_change():
    splits = embedded_facts.splits(World())
    changed = {parts(row["prompt"])[1] for row in splits["train"]}
    asked = {
        name: {parts(row["query"])[1] for row in rows}
        for name, rows in splits.items()
        if "_" in name
    }
    assert asked["target_dev"] == asked["target_test"] == changed
    assert not changed & (asked["retention_dev"] | asked["retention_test"])


def test_questions_are_about_all_entities_alike():
    world = World()
    splits, facts = embedded_facts.splits(world), embedded_facts.draw(world)
    asked = {parts(row["query"])[0] for row in splits["retention_test"]}
    names = [facts.entities[entity] for entity in facts.shown_test + facts.test]
    for half in names[: len(names) // 2], names[len(names) // 2 :]:
        assert len(asked & set(half)) > 0.3 * len(asked)
