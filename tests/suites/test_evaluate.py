"""lm-eval in memory: its answers are the model's, its tasks are found, nothing is disturbed."""

import copy
import dataclasses
import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from suites.catalog import LLAMA_PROJECTIONS
from suites.evaluate import _code_execution, check, evaluate, flaw
from suites.harness import Harness
from suites.methods import METHODS
from suites.models import load_model, load_tokenizer
from suites.record import TaskScore
from suites.suite import Budget, ModelSource, Task

TARGET = Task("world_target", "acc,none", "target")
RETENTION = Task("world_retention", "acc,none", "retention")


@pytest.fixture(scope="module")
def loaded(world_folder):
    source = ModelSource(str(world_folder / "model"), "float32")
    return load_model(source, "cpu"), load_tokenizer(source)


def questions(folder, name):
    return [json.loads(line) for line in (folder / "data" / f"{name}.jsonl").open()]


def own_accuracy(model, tokenizer, rows) -> list[float]:
    """Each question by a plain forward pass: the likeliest of the choices' single tokens."""
    correct = []
    for row in rows:
        ids = tokenizer(row["query"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        choices = torch.tensor(tokenizer.convert_tokens_to_ids(row["choices"]))
        correct.append(float(logits[choices].argmax().item() == row["answer"]))
    return correct


def test_scores_are_those_of_a_plain_forward_pass(loaded, world_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scores = evaluate(*loaded, [TARGET, RETENTION], str(world_folder / "tasks"), batch_size=7)
    assert list(scores) == ["world_target", "world_retention"]
    for name, data in (("world_target", "target_test"), ("world_retention", "retention_test")):
        rows = questions(world_folder, data)
        assert list(scores[name].per_item) == own_accuracy(*loaded, rows)
        assert scores[name].value == pytest.approx(np.mean(scores[name].per_item))
        assert scores[name].doc_ids == tuple(range(len(rows)))
        assert scores[name].num_items == len(rows)


def test_an_answer_built_into_the_model_scores_one(loaded, world_folder, tmp_path):
    """Always asked for the value that the model likes best, accuracy has to be 1."""
    folder = shutil.copytree(world_folder, tmp_path / "copy")
    path = folder / "data" / "target_test.jsonl"
    model, tokenizer = loaded
    rows = questions(folder, "target_test")
    for row in rows:
        right = [own_accuracy(model, tokenizer, [{**row, "answer": i}])[0] for i in range(8)]
        row["answer"] = right.index(1.0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert evaluate(*loaded, [TARGET], str(folder / "tasks"), 64)["world_target"].value == 1.0


def test_limit_asks_the_first_items(loaded, world_folder):
    tasks = str(world_folder / "tasks")
    whole = evaluate(*loaded, [TARGET], tasks, 64)["world_target"]
    part = evaluate(*loaded, [TARGET], tasks, 64, limit=5)["world_target"]
    assert part.per_item == whole.per_item[:5]


def test_nothing_is_disturbed(loaded, world_folder, capfd):
    model, tokenizer = loaded
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    evaluate(model, tokenizer, [TARGET], str(world_folder / "tasks"), 64)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert before == after
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert capfd.readouterr().err == ""
    model.eval()


@pytest.mark.parametrize(("rank", "num_left"), [(4, 64 - 31), (64, 64)])
def test_virtual_tokens_leave_less_room_for_questions(loaded, rank, num_left):
    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    assert Harness(model, tokenizer, 4).max_length == 64
    budget = Budget(rank, LLAMA_PROJECTIONS)
    prefix = METHODS["prefix"].load().prepare(model, budget, total_steps=1).model
    assert Harness(prefix, tokenizer, 4).max_length == num_left


@pytest.fixture
def tasks(tmp_path):
    """Writes a task of three questions about two tokens each; returns the folder."""

    def write(name, **changes):
        (tmp_path / "rows.jsonl").write_text(
            "".join(json.dumps({"n": n, "choices": ["a", "b", "c", "d"]}) + "\n" for n in range(3))
        )
        config = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{n}}",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc"}],
            **changes,
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.dump(config))
        return str(tmp_path)

    return write


def test_prompts_without_room_are_counted(loaded, tasks):
    model, tokenizer = loaded
    word = tokenizer.convert_ids_to_tokens(5)
    long = f"{{% if n < 2 %}}{' '.join([word] * 70)}{{% endif %}} {word}"
    folder = tasks("long", doc_to_text=long)
    ask = Task("long", "acc,none", "target")
    assert evaluate(model, tokenizer, [ask], folder, 4)["long"].num_cut == 2 * 4
    folder = tasks("edge", doc_to_text=f"{{{{ ' '.join(['{word}'] * (63 + n)) }}}}")
    texts = [" ".join([word] * (63 + n)) + " a" for n in range(3)]
    # The last token of the answer is only asked for.
    are_long = [len(tokenizer(text)["input_ids"]) > 65 for text in texts]
    assert are_long.count(True) in (1, 2)
    ask = Task("edge", "acc,none", "target")
    found = evaluate(model, tokenizer, [ask], folder, 4)["edge"]
    assert found.num_cut == 4 * are_long.count(True)
    said = {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 2}}
    metric = {"metric_list": [{"metric": "exact_match"}], "doc_to_choice": None}
    folder = tasks("said", doc_to_text=long, doc_to_target="a", **said, **metric)
    ask = Task("said", "exact_match,none", "target")
    assert evaluate(model, tokenizer, [ask], folder, 4)["said"].num_cut == 2


def test_the_first_value_that_is_not_finite_is_named():
    items = (1.0, 0.0, 1.0), (0, 1, 0), {"algebra": 2, "anatomy": 1}
    score = TaskScore(0.5, "acc,none", "target", "test", 3, *items)
    assert flaw(score) == ""
    assert flaw(dataclasses.replace(score, value=math.inf)) == "inf"
    odd = dataclasses.replace(score, value=math.nan, per_item=(1.0, 0.0, math.nan))
    assert flaw(odd) == "nan on item 0 of anatomy"
    whole = dataclasses.replace(odd, doc_ids=(0, 1, 2), subtasks={"odd": 3})
    assert flaw(whole) == "nan on item 2"


def test_a_metric_that_is_not_there_is_refused(loaded, world_folder):
    task = dataclasses.replace(TARGET, metric="exact_match,none")
    with pytest.raises(ValueError, match=r"no metric 'exact_match,none'; it has: acc,none"):
        evaluate(*loaded, [task], str(world_folder / "tasks"), 64)


def test_a_task_that_is_not_there_is_refused(loaded, world_folder):
    task = dataclasses.replace(TARGET, name="world_targit")
    with pytest.raises(ValueError, match=r"no task 'world_targit'; nearest: world_target"):
        evaluate(*loaded, [task], str(world_folder / "tasks"), 64)


def test_a_task_folder_that_is_not_there_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="is no folder of lm-eval YAML files"):
        evaluate(*loaded, [TARGET], str(tmp_path / "none"), 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"metric": "accuracy,none"},
            "task world_target has no metric 'accuracy,none'; .*acc,none",
        ),
        ({"metric": "acc,nome"}, "task world_target has no metric 'acc,nome'; it has: acc,none"),
        ({"name": "world_targit"}, "has no task 'world_targit'; nearest: world_target"),
        ({"data_split": "train"}, "task world_target: its data json cannot be loaded"),
    ],
)
def test_what_would_be_refused_after_training_is_known_before(world_folder, change, message):
    tasks = str(world_folder / "tasks")
    check([TARGET, RETENTION], tasks)
    with pytest.raises(ValueError, match=message):
        check([RETENTION, dataclasses.replace(TARGET, **change)], tasks)


def test_a_prompt_without_room_loses_its_beginning_and_one_that_just_fits_nothing(loaded):
    harness = Harness(*loaded, 4)
    text = " ".join(loaded[1].convert_ids_to_tokens(range(5, 9)))
    (whole,), _ = harness.tok_batch_encode([text])
    ids, mask = harness.tok_batch_encode([text], left_truncate_len=len(whole))
    assert (ids.tolist(), harness.num_cut) == ([whole.tolist()], 0)
    ids, mask = harness.tok_batch_encode([text], left_truncate_len=2)
    assert (ids.tolist(), mask.tolist(), harness.num_cut) == ([whole[-2:].tolist()], [[1, 1]], 1)


def test_shorter_prompts_are_padded_at_their_beginning(loaded):
    harness = Harness(*loaded, 4)
    words = loaded[1].convert_ids_to_tokens(range(5, 9))
    _, mask = harness.tok_batch_encode([" ".join(words), words[0]])
    assert mask[1].tolist() == sorted(mask[1].tolist())
    assert mask[1].tolist() != mask[0].tolist()


def test_random_generators_are_left_as_they_were_whatever_that_was(loaded, world_folder):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    for seeded in (random.seed, np.random.seed, torch.manual_seed):
        seeded(99)
    before = states()
    evaluate(*loaded, [TARGET], str(world_folder / "tasks"), 64)
    assert states() == before


DRAWS = {
    "random": "random.sample(row['choices'], 4)",
    "numpy": "numpy.random.permutation(row['choices']).tolist()",
    "torch": "[row['choices'][i] for i in torch.randperm(4)]",
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_tasks_that_shuffle_by_any_generator_ask_the_same(loaded, tasks, draw):
    folder = tasks("shuffled", process_docs="!function own.shuffled")
    text = (Path(folder) / "shuffled.yaml").read_text()
    (Path(folder) / "shuffled.yaml").write_text(
        text.replace("'!function own.shuffled'", "!function own.shuffled")
    )
    (Path(folder) / "own.py").write_text(
        "import random, numpy, torch\n"
        "def shuffled(rows):\n"
        f"    return type(rows).from_list([{{**row, 'choices': {draw}}} for row in rows])\n"
    )
    ask, hashes = Task("shuffled", "acc,none", "target"), set()
    for seed in range(3):
        for seeded in (random.seed, np.random.seed, torch.manual_seed):
            seeded(seed)
        hashes.add(evaluate(*loaded, [ask], folder, 4)["shuffled"].items_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize("before", [None, "0"])
def test_what_the_user_allows_is_as_it_was_after_a_task_that_runs_code(monkeypatch, before):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    if before is not None:
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", before)
    with _code_execution(Task("t", "acc,none", "target", runs_code=True), allowed=True):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    assert os.environ.get("HF_ALLOW_CODE_EVAL") == before


@pytest.mark.parametrize(
    "change",
    [{"doc_to_text": "other {{n}}"}, {"doc_to_target": 1}],
    ids=["prompt", "answer"],
)
def test_another_prompt_or_answer_is_another_items_hash(loaded, tasks, change):
    ask = Task("asked", "acc,none", "target")
    before = evaluate(*loaded, [ask], tasks("asked"), 4)["asked"].items_hash
    assert evaluate(*loaded, [ask], tasks("asked"), 4)["asked"].items_hash == before
    assert evaluate(*loaded, [ask], tasks("asked", **change), 4)["asked"].items_hash != before


def test_of_two_filters_the_named_one_gives_the_items(loaded, tasks):
    said = {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 2}}
    filters = [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {"name": "second", "filter": [{"function": "take_first"}]},
    ]
    metric = {"metric_list": [{"metric": "exact_match"}], "doc_to_choice": None}
    folder = tasks("said", doc_to_target="a", filter_list=filters, **said, **metric)
    found = evaluate(*loaded, [Task("said", "exact_match,second", "target")], folder, 4)["said"]
    assert (found.num_items, found.doc_ids) == (3, (0, 1, 2))


def test_each_task_has_its_own_number_of_cut_prompts(loaded, tasks):
    word = loaded[1].convert_ids_to_tokens(5)
    folder = tasks("long", doc_to_text=" ".join([word] * 70))
    tasks("short", doc_to_text=word)
    asked = [Task(name, "acc,none", "target") for name in ("long", "short")]
    found = evaluate(*loaded, asked, folder, 4)
    assert (found["long"].num_cut, found["short"].num_cut) == (12, 0)
