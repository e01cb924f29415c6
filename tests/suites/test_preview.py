"""What --plan says is what a run then finds, and it starts nothing."""

import dataclasses

import pytest

from suites import catalog, preview, record, run
from suites.estimate import activation_bytes, earlier_records, estimate, meta_model, seconds
from suites.plan import Execution, plan
from suites.shapes import SHAPES
from suites.sources import ModelSource
from suites.suite import Budget, Recipe
from tests.suites.arena import ENVIRONMENT, cell, finished, small_suite


@pytest.fixture
def arena(monkeypatch):
    monkeypatch.setitem(run.SUITES, "small", small_suite())


def test_plan_names_cells_budgets_memory_and_time(arena, tmp_path, capsys):
    done = plan(small_suite(), ["lora"], [0])[0]
    record.write(finished(done), done.record_path(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    arguments = ["small", "--methods", "base,full,lora,spiel", "--plan", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"done  {done.record_path(tmp_path)}" in printed
    assert printed.count("to do ") == 7
    assert "7 of 8 cells to do, time: unknown" in printed
    lines = {line.split()[1]: line for line in printed.splitlines() if line.startswith("│")}
    assert "100%" in lines["lora"] and "1/2" in lines["lora"]
    assert "†" in lines["full"] and "†" in lines["base"]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("method", ["lora", "spiel", "full", "randlora", "shira"])
def test_weights_are_those_that_are_trained(method, world_folder):
    from suites.models import load_model
    from suites.suite import placed

    of = cell(method, suite=small_suite(recipe=Recipe(num_steps=6, batch_size=4)))
    model = load_model(placed(of.suite, world_folder).model, "cpu")
    contestant = of.entry.load().prepare(model, of.suite.budget, 6)
    assert estimate(of, Execution()).num_trainable == contestant.num_trainable


def test_many_methods_are_estimated_as_each_alone():
    names = ["base", "full", "lora", "dora", "spiel", "prefix"]
    cells = [cell(name) for name in names]
    assert len(cells) > preview.FEW
    found = preview._estimates(cells, Execution())
    assert list(found) == names
    assert found["dora"] == estimate(cells[3], Execution())


def test_seven_billion_weights_need_no_memory_to_plan():
    suite = small_suite(
        model=ModelSource("Llama-2-7b", shape_only=True),
        world=None,
        budget=Budget(64, catalog.LLAMA_PROJECTIONS),
        recipe=Recipe(num_steps=6, batch_size=4),
    )
    found = estimate(cell("spiel", suite=suite), Execution())
    assert found.num_trainable == pytest.approx(found.num_asked, rel=0.01)
    assert found.weights_bytes == pytest.approx(6.74e9 * 2 + 159_907_840 * 4, rel=0.01)
    assert found.optimizer_bytes == 2 * found.gradient_bytes == 8 * found.num_trainable
    quantized = dataclasses.replace(suite, model=dataclasses.replace(suite.model, quantize="4bit"))
    full, narrow = (estimate(cell(n, suite=suite), Execution()) for n in ("full", "full-bf16"))
    # Weights in fp32 and their copies in bf16, against bf16 alone.
    assert full.weights_bytes == pytest.approx(6.74e9 * (4 + 2), rel=0.01)
    assert full.optimizer_bytes == 2 * full.gradient_bytes == 4 * narrow.gradient_bytes
    assert narrow.gradient_bytes == 2 * narrow.num_trainable == pytest.approx(narrow.weights_bytes)
    packed = estimate(cell("lora", suite=quantized), Execution())
    # 6.48 G weights in 4 bits, embeddings and head in two bytes, LoRA in four.
    expected = 6.476e9 * 4.127 / 8 + 0.262e9 * 2 + 159_907_840 * 4
    assert packed.weights_bytes == pytest.approx(expected, rel=0.02)


def test_activations_are_near_what_autograd_keeps():
    import torch

    from suites.measure import saved_for_backward_bytes
    from suites.models import random_model

    source = ModelSource("tiny", dtype="float32", shape_only=True)
    suite = small_suite(model=source, world=None, recipe=Recipe(num_steps=3, batch_size=2))
    ids = torch.ones(2, suite.data.max_length, dtype=torch.long)
    kept = saved_for_backward_bytes(random_model(source, "cpu"), {"input_ids": ids, "labels": ids})
    config = meta_model(suite).config
    assert config.hidden_size == SHAPES["tiny"]["hidden_size"]
    assert kept / 1.5 < activation_bytes(config, suite) < kept * 1.5
    recipe = dataclasses.replace(suite.recipe, gradient_checkpointing=True)
    assert 2 * activation_bytes(config, suite, num_ranks=2) == activation_bytes(config, suite)
    less = activation_bytes(config, dataclasses.replace(suite, recipe=recipe))
    assert less < activation_bytes(config, suite)


def test_time_is_that_of_cells_alike():
    phases = {name: record.PhaseCost(1.0, 0) for name in ("load", "prepare", "evaluate")}
    other = finished(cell("full"), phases=phases)
    lora = finished(cell(), phases=phases, seconds=0.5)
    longer = small_suite(recipe=Recipe(num_steps=100, batch_size=4))
    assert seconds(cell(suite=longer), [lora, other]) == pytest.approx(3 + 100 * 0.5)
    for other in (
        cell(suite=small_suite(limit=3)),
        cell(split="dev"),
        cell(suite=small_suite(eval_batch_size=3)),
    ):
        assert seconds(other, [lora]) is None
    wider = small_suite(recipe=Recipe(num_steps=100, batch_size=8))
    assert seconds(cell(suite=wider), [lora]) is None


def test_what_has_to_come_from_the_hub_is_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("suites.hub._refusal", lambda kind, path: "no network")
    arguments = ["metamath", "--methods", "base,lora", "--plan", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("cannot be had from the hub:") == 1
    model = [line for line in lines if "no network" in line and "Llama-3.2-3B" in line]
    assert model[0].startswith("base, lora: ")
    assert (
        model[1] == "model meta-llama/Llama-3.2-3B: no network; --model takes a local model folder"
    )


def test_a_model_that_cannot_be_is_no_plan(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["mmlu_flan", "--model", str(tmp_path / "none"), "--plan"])
    assert "is neither a folder nor a hub id" in capsys.readouterr().err


def test_only_cells_that_ended_well_here_tell_the_time(tmp_path):
    ok, failed, elsewhere = (cell(seed=seed) for seed in range(3))
    record.write(finished(ok), ok.record_path(tmp_path))
    record.write(
        dataclasses.replace(finished(failed), status="failed"), failed.record_path(tmp_path)
    )
    other = dataclasses.replace(ENVIRONMENT, cpu="another")
    record.write(finished(elsewhere, environment=other), elsewhere.record_path(tmp_path))
    assert [each.seed for each in earlier_records(tmp_path, ENVIRONMENT)] == [0]
