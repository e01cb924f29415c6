"""What is missing from the hub is named before anything starts, with what would do instead."""

import dataclasses
import re
import socket
import time
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from suites import hub, runner
from suites.catalog import SUITES
from suites.hub import missing_from_hub
from suites.models import load_model, load_tokenizer
from suites.overrides import override
from suites.plan import Execution, plan
from suites.runner import NotReadyError
from suites.sources import ModelSource
from tests.suites import hub_files

MODEL, DATA = "meta-llama/Llama-2-7b-hf", "ostapeno/tulu_v2_flan_v2_subset"


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    """Empty caches; returns the folder of the hub's."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    return tmp_path / "hub"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def answers(monkeypatch, answer):
    """Has the hub give `answer(path)` to every question."""
    for kind in ("model", "dataset"):
        monkeypatch.setattr(
            f"huggingface_hub.HfApi.{kind}_info", lambda self, path, timeout: answer(path)
        )


def refusal(kind, text):
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=403))


def test_the_commit_of_a_cached_model_is_known(offline, caches):
    assert hub.cached_commit("me/tiny") is None
    commit, folder = "a" * 40, caches / "models--me--tiny"
    hub_files.write_model(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    assert hub.cached_commit("me/tiny") == commit
    assert hub.cached_commit(str(folder / "snapshots" / commit)) is None


def test_a_revision_is_what_is_loaded(offline, caches, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    folder = caches / "models--me--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    for commit, scale in (("a" * 40, 1.0), ("b" * 40, 2.0)):
        path = hub_files.write_model(folder / "snapshots" / commit)
        model = load_model(ModelSource(str(path), "float32"), "cpu")
        with torch.no_grad():
            model.lm_head.weight *= scale
        model.save_pretrained(path)
    newest, older = (
        ModelSource("me/tiny", "float32", revision=revision) for revision in (None, "b" * 40)
    )
    weights = [load_model(source, "cpu").lm_head.weight for source in (newest, older)]
    assert torch.equal(2 * weights[0], weights[1])
    assert hub.cached_commit("me/tiny", older.revision) == older.revision
    assert load_tokenizer(older) is not None


@pytest.mark.parametrize("name", ["quickstart", "lab", "footprint", "footprint_tiny"])
def test_suites_without_the_hub_miss_nothing(offline, name):
    assert missing_from_hub(SUITES[name]) == []


@pytest.mark.parametrize(
    ("flag", "path", "message"),
    [
        (
            "data",
            "/nowhere/rows.jsonl",
            r"data /nowhere/rows.jsonl is not there, seen from .*; needed: a",
        ),
        ("data", "rows.jsonl", r"data rows.jsonl is not there, seen from .*; needed: a .jsonl"),
        ("model", "/nowhere/model", "'/nowhere/model' is neither a folder nor a hub id"),
        ("model", "tests", "tests is a folder without config.json, so it holds no model"),
    ],
)
def test_local_paths_that_are_not_there_stop_a_run_before_it_starts(
    offline, flag, path, message, tmp_path
):
    suite = override(SUITES["quickstart"], **{flag: path})
    with pytest.raises(ValueError, match=message):
        missing_from_hub(suite)
    with pytest.raises(NotReadyError, match=message):
        runner.run(plan(suite, ["base"], [0]), tmp_path, Execution(), None)


def test_everything_missing_is_named_with_what_would_do_instead(offline):
    lines = missing_from_hub(SUITES["mmlu_flan"])
    why = "HF_HUB_OFFLINE is set"
    assert lines == [
        f"model {MODEL}: {why}; --model takes a local model folder",
        f"data {DATA}: {why}; --data takes a local file or folder",
        f"data of task mmlu cais/mmlu: {why}; "
        "--task-folder DIR takes a copy of it in DIR/cais/mmlu",
        "data of task general_text EleutherAI/wikitext_document_level: "
        f"{why}; --task-folder DIR takes a copy of it in DIR/EleutherAI/wikitext_document_level",
    ]


def test_tasks_that_may_not_run_are_not_missed(offline):
    suite = SUITES["flan_v2"]
    assert not any("humaneval" in line for line in missing_from_hub(suite))
    suite = dataclasses.replace(suite, allow_code_execution=True)
    assert any("openai/openai_humaneval" in line for line in missing_from_hub(suite))


def test_local_paths_do_instead(offline, tmp_path):
    suite = SUITES["mmlu_flan"]
    data = hub_files.write_jsonl(tmp_path / "data.jsonl", hub_files.conversations())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    for name in ("cais/mmlu", "EleutherAI/wikitext_document_level"):
        (tmp_path / "tasks" / name).mkdir(parents=True)
    suite = dataclasses.replace(
        suite,
        model=dataclasses.replace(suite.model, path=str(tmp_path / "model")),
        data=dataclasses.replace(suite.data, path=str(data)),
        task_folder=str(tmp_path / "tasks"),
    )
    assert missing_from_hub(suite) == []


def test_what_is_cached_is_not_missed(offline, caches, tmp_path):
    def cache(kind, name, file):
        folder = caches / f"{kind}s--{name.replace('/', '--')}" / "snapshots" / "1a2b"
        folder.mkdir(parents=True)
        (folder / file).touch()

    cache("model", MODEL, "config.json")  # and no weights: it was only looked at
    cache("dataset", DATA, "README.md")
    (tmp_path / "datasets" / "cais___mmlu" / "anatomy" / "0.0.0").mkdir(parents=True)
    lines = missing_from_hub(SUITES["mmlu_flan"])
    assert [line.split(":")[0] for line in lines] == [
        f"model {MODEL}",
        "data of task general_text EleutherAI/wikitext_document_level",
    ]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (refusal(GatedRepoError, "gated"), "its owner has to grant access"),
        (refusal(RepositoryNotFoundError, "none"), "no such repository, or it is private"),
        (TimeoutError(), r"the hub cannot be reached \(TimeoutError\)"),
    ],
)
def test_each_refusal_says_what_it_is(monkeypatch, error, message):
    def answer(path):
        if path == MODEL:
            raise error
        return SimpleNamespace(gated=False)

    answers(monkeypatch, answer)
    (line,) = missing_from_hub(SUITES["mmlu_flan"])
    assert re.match(f"model {MODEL}: .*{message}", line)


def test_a_gated_model_needs_more_than_its_description(monkeypatch):
    answers(monkeypatch, lambda path: SimpleNamespace(gated="manual" if path == MODEL else False))
    asked = []

    def check(self, path, repo_type):
        asked.append(path)
        raise refusal(GatedRepoError, "gated")

    monkeypatch.setattr("huggingface_hub.HfApi.auth_check", check)
    (line,) = missing_from_hub(SUITES["mmlu_flan"])
    assert "grant access" in line
    assert asked == [MODEL]


def test_a_hub_that_keeps_silent_is_not_waited_for(monkeypatch):
    """It takes connections and never answers."""
    missing_from_hub(SUITES["quickstart"])
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{port}")
        started = time.monotonic()
        lines = missing_from_hub(SUITES["mmlu_flan"])
        assert time.monotonic() - started < 7  # one after the other they would take 8
    assert len(lines) == 4


def test_a_dead_hub_is_switched_off(monkeypatch):
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    hub.stay_offline_if_unreachable()
    import datasets
    import huggingface_hub

    assert datasets.config.HF_HUB_OFFLINE
    assert huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_shape_of_the_hub_needs_its_config(offline):
    suite = dataclasses.replace(
        SUITES["footprint"], model=ModelSource("some/model", shape_only=True)
    )
    assert missing_from_hub(suite) == [
        "model some/model: HF_HUB_OFFLINE is set; --model takes a local model folder"
    ]
