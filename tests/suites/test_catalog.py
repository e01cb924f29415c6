"""Every suite, whole, on the CPU: a tiny local model and local files as the hub has them."""

import dataclasses
import math
import shutil
import sys
import tempfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from suites import cell, questions
from suites.catalog import SUITES
from suites.distributed import Rank
from suites.embedded import build
from suites.methods import METHODS
from suites.overrides import override
from suites.plan import FORM_OF, Cell, Execution, plan, plan_search
from suites.record import Record
from suites.suite import Suite, Tuning
from tests.conftest import TINY
from tests.suites import hub_files

#: One more than SpIEL needs before its first reselection.
NUM_STEPS = 6

LANGUAGES = (
    "arabic",
    "bengali",
    "english",
    "finnish",
    "indonesian",
    "korean",
    "russian",
    "swahili",
    "telugu",
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A folder with a model, training data, and in tasks/ copies of every data set asked."""
    root = tmp_path_factory.mktemp("hub")
    hub_files.write_model(root / "model")
    hub_files.write_jsonl(root / "conversations.jsonl", hub_files.conversations())
    for name in ("alpaca", "metamath"):
        table = pyarrow.Table.from_pylist(getattr(hub_files, name)())
        parquet.write_table(table, root / f"{name}.parquet")
    subsets = {
        name: [leaf.config["dataset_name"] for leaf in questions.subtasks(name, None)]
        for name in ("mmlu", "bbh_cot_fewshot")
    }
    tasks = root / "tasks"
    for name, rows in {
        "cais/mmlu": hub_files.mmlu(subsets["mmlu"]),
        "openai/gsm8k": hub_files.gsm8k(),
        "SaylorTwift/bbh": hub_files.bbh(subsets["bbh_cot_fewshot"]),
        "google-research-datasets/tydiqa": hub_files.tydiqa(LANGUAGES),
        "openai/openai_humaneval": hub_files.humaneval(),
        "EleutherAI/wikitext_document_level": hub_files.wikitext(),
    }.items():
        hub_files.write_repository(tasks, name, rows)
    return root


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """No hub, and no cache but the tests' own."""
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)


def local(suite: Suite, hub: Path, data: str, task_folder: Path | None = None) -> Suite:
    """What the command's flags make of `suite`, and fewer micro-batches a step."""
    changed = override(
        suite,
        model=str(hub / "model"),
        data=str(hub / data),
        task_folder=str(task_folder or hub / "tasks"),
        steps=NUM_STEPS,
        limit=1,
        seq_len=128,
        budget="r2",
    )
    recipe = dataclasses.replace(changed.recipe, gradient_accumulation_steps=2)
    return dataclasses.replace(changed, recipe=recipe)


def run(suite: Suite, method: str = "lora", split: str = "test", world: Path | None = None):
    tuning = None if method == "base" else Tuning(1e-3)
    planned = Cell(suite, method, METHODS[method], tuning, 0, split)
    way = Execution(save_seconds=None)
    with tempfile.TemporaryDirectory() as out:
        done = cell.run(planned, world, Path(out), way, Rank(), lambda report: None)
    assert done.status == "ok", done.reason
    return done


def check_training(done: Record, num_examples: int) -> None:
    assert len(done.training.losses) == NUM_STEPS
    assert all(math.isfinite(loss) for loss in done.training.losses)
    assert done.training.num_examples == num_examples
    assert done.training.num_dropped == 0
    assert len(done.training.yardstick_seconds) == 2 and min(done.training.yardstick_seconds) > 0


def test_mmlu_flan_on_lm_evals_own_definitions_and_a_copy_of_their_data(hub):
    suite = local(SUITES["mmlu_flan"], hub, "conversations.jsonl")
    done = run(suite)
    check_training(done, 12)
    mmlu = done.scores["mmlu"]
    assert (mmlu.num_items, mmlu.role, mmlu.metric) == (57, "target", "acc,none")
    assert len(mmlu.subtasks) == len(mmlu.per_item) == 57
    assert 0 < done.scores["general_text"].value < 1


def test_mmlu_flan_is_searched_on_mmlus_validation_split(hub, tmp_path):
    """Two subjects, as a user's YAML may say: lm-eval's definitions, with other data."""
    built_in = questions.subtasks("mmlu_anatomy", None)[0].folder
    copy = shutil.copytree(hub / "tasks" / "EleutherAI", tmp_path / "EleutherAI")
    assert copy.is_dir()
    splits = hub_files.mmlu(["anatomy"], 4)["anatomy"]
    for split, rows in splits.items():
        hub_files.write_jsonl(tmp_path / f"{split}.jsonl", rows)
    subjects = ("mmlu_anatomy", "mmlu_virology")
    for subject in subjects:
        files = "".join(f"    {split}: {split}.jsonl\n" for split in splits)
        (tmp_path / f"{subject}.yaml").write_text(
            f"include: {built_in}/{subject}.yaml\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs:\n  data_files:\n{files}"
        )
    (tmp_path / "mmlu.yaml").write_text(f"group: mmlu\ntask: [{', '.join(subjects)}]\n")
    suite = local(SUITES["mmlu_flan"], hub, "conversations.jsonl", tmp_path)
    suite = dataclasses.replace(suite, limit=None)
    scores = run(suite, "base", "dev").scores
    assert set(scores) == {"mmlu", "general_text_dev"}
    assert scores["mmlu"].num_items == 2 * 5  # validation has one more than test


def test_flan_v2_asks_the_papers_tasks(hub, monkeypatch):
    """HumanEval's metric is code of the hub's: ours stands in for it, and executes as much."""

    class PassAtOne:
        def compute(self, references, predictions, k):
            assert __import__("os").environ["HF_ALLOW_CODE_EVAL"] == "1"
            for reference, (prediction,) in zip(references, predictions, strict=True):
                try:
                    exec(f"{prediction}\n{reference}", {})
                except Exception:
                    return {"pass@1": 0.0}, {}
            return {"pass@1": 1.0}, {}

    monkeypatch.setattr("evaluate.load", lambda name: PassAtOne())
    monkeypatch.delitem(sys.modules, "lm_eval.tasks.humaneval.utils", raising=False)
    suite = local(SUITES["flan_v2"], hub, "conversations.jsonl")
    assert "humaneval" not in {task.name for task in suite.tasks_of("test")}
    tasks = tuple(task for task in suite.tasks if task.name != "mmlu")
    done = run(dataclasses.replace(suite, tasks=tasks, allow_code_execution=True), "base")
    counts = {name: score.num_items for name, score in done.scores.items()}
    assert counts == {
        "gsm8k_cot": 1,
        "bbh_cot_fewshot": 27,
        "tydiqa_goldp": 9,
        "humaneval": 1,
        "general_text": 1,
    }


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("gpt4_alpaca", "alpaca.parquet"),
        ("tulu_v2", "conversations.jsonl"),
        ("tulu_v2_13b", "conversations.jsonl"),
    ],
)
def test_the_other_mixtures_train(hub, name, data):
    suite = local(SUITES[name], hub, data)
    tasks = tuple(task for task in suite.tasks if task.name in ("gsm8k_cot", "general_text"))
    done = run(dataclasses.replace(suite, tasks=tasks), "spiel")
    check_training(done, 12)
    assert set(done.scores) == {"gsm8k_cot", "general_text"}


@pytest.mark.parametrize("split", ["test", "dev"])
def test_metamath(hub, split):
    done = run(local(SUITES["metamath"], hub, "metamath.parquet"), split=split)
    check_training(done, 12)
    suffix = "" if split == "test" else "_dev"
    assert set(done.scores) == {f"gsm8k_metamath{suffix}", f"general_text{suffix}"}


def test_footprint_needs_nothing():
    suite = SUITES["footprint_tiny"]
    recipe = dataclasses.replace(suite.recipe, num_steps=NUM_STEPS)
    done = run(dataclasses.replace(suite, recipe=recipe), "spiel")
    assert done.scores == {}
    assert done.training.num_tokens == NUM_STEPS * 128
    assert done.size.saved_for_backward_bytes > 0


def test_footprint_in_4_bits():
    pytest.importorskip("bitsandbytes")
    suite = SUITES["footprint_tiny"]
    model = dataclasses.replace(suite.model, quantize="4bit")
    recipe = dataclasses.replace(suite.recipe, num_steps=2)
    done = run(dataclasses.replace(suite, model=model, recipe=recipe))
    assert done.size.matched
    assert len(done.training.losses) == 2


def test_lab_is_the_quickstart_in_a_larger_world(world_cache):
    assert SUITES["lab"].world.hidden_size > SUITES["quickstart"].world.hidden_size
    recipe = dataclasses.replace(SUITES["lab"].recipe, num_steps=2)
    suite = dataclasses.replace(SUITES["lab"], world=TINY, recipe=recipe, limit=3)
    done = run(suite, world=build(TINY, world_cache))
    assert {score.num_items for score in done.scores.values()} == {3}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_every_suite_is_complete(suite):
    if suite.tasks:
        assert {task.role for task in suite.tasks_of("dev")} == {"target", "retention"}
        assert {task.role for task in suite.tasks_of("test")} == {"target", "retention"}
    assert set(suite.tunings) | set(suite.grids) <= set(METHODS)
    assert suite.tunings or "--search" in suite.description
    for method, grid in suite.grids.items():
        assert method not in suite.tunings or suite.tunings[method] in grid
    assert len({len(grid) for grid in suite.grids.values()}) <= 1


@pytest.mark.parametrize("suite", [s for s in SUITES.values() if s.grids], ids=lambda s: s.name)
def test_every_method_that_trains_can_be_searched(suite):
    trained = [n for n, entry in METHODS.items() if entry.trains and n not in FORM_OF]
    assert set(suite.grids) == set(trained)
    for form, of in FORM_OF.items():
        assert {each.tuning for each in plan_search(suite, [form], [0])} == set(suite.grids[of])
    for name in trained:
        rates = [tuning.lr for tuning in suite.grids[name]]
        assert len(set(rates)) == len(rates)
    trials = plan_search(suite, trained, [0])
    assert len(trials) == sum(len(grid) for grid in suite.grids.values())
    assert len({trial.record_path(Path("out")) for trial in trials}) == len(trials)


def test_flags_and_plans_mean_the_test_split_and_point_to_the_search():
    tasks = override(SUITES["mmlu_flan"], tasks="mmlu").tasks
    assert [(task.name, task.split) for task in tasks] == [
        ("mmlu", "test"),
        ("mmlu", "dev"),
        ("general_text_dev", "dev"),
    ]
    with pytest.raises(ValueError, match=r"no learning rate for 'dora'.*--search picks one"):
        plan(SUITES["mmlu_flan"], ["dora"], [0])
    with pytest.raises(
        ValueError, match=r"no learning rate for 'lora', nor for any.*--search picks"
    ):
        plan(SUITES["lab"], ["lora"], [0])
    with pytest.raises(ValueError, match="--task-folder: nowhere is no folder"):
        override(SUITES["mmlu_flan"], task_folder="nowhere")


def test_variants_differ_in_the_model_alone():
    for name in ("mmlu_flan", "flan_v2", "gpt4_alpaca", "tulu_v2"):
        small, large = SUITES[name], SUITES[f"{name}_13b"]
        assert (small.model.path, large.model.path) == (
            "meta-llama/Llama-2-7b-hf",
            "meta-llama/Llama-2-13b-hf",
        )
        assert (
            dataclasses.replace(
                large, name=small.name, description=small.description, model=small.model
            )
            == small
        )
