"""Local files that a cell reads make its hash; others, and the embedded world's, do not."""

import os

import pytest

from suites import runner
from suites.inputs import fingerprint, unchanged
from suites.suite import DataSource, ModelSource
from tests.suites.arena import cell, small_suite

YAML = """\
task: mine
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
process_results: !function marks.mark
doc_to_text: "{text}"
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def tasks(tmp_path):
    """A task folder with questions in it, beside it, and in a copy of a hub data set."""
    folder = tmp_path / "tasks"
    write(folder / "mine.yaml", YAML.format(data="../data/asked.jsonl", text="long " * 200))
    write(folder / "marks.py", "def mark(doc, results): ...")
    write(folder / "own.jsonl", "{}")
    write(folder / "cais" / "mmlu" / "data" / "test.parquet", "rows")
    write(folder / ".cache" / "lock", "")
    write(tmp_path / "data" / "asked.jsonl", "{}")
    return folder


def hash_with(**changes):
    return cell(suite=small_suite(**changes)).hash


@pytest.mark.parametrize(
    "changed",
    ["mine.yaml", "marks.py", "own.jsonl", "cais/mmlu/data/test.parquet", "../data/asked.jsonl"],
)
def test_edited_questions_make_another_cell(tasks, changed):
    before = hash_with(task_folder=str(tasks))
    assert hash_with(task_folder=str(tasks)) == before
    write(tasks / changed, (tasks / changed).read_text() + " ")
    assert hash_with(task_folder=str(tasks)) != before


def test_new_questions_make_another_cell(tasks):
    before = hash_with(task_folder=str(tasks))
    write(tasks / "new" / "more.yaml", "task: more")
    assert hash_with(task_folder=str(tasks)) != before


def test_questions_count_by_their_content(tasks):
    """A fresh checkout in CI has other times, and has to find the records that were kept."""
    before = hash_with(task_folder=str(tasks))
    for file in tasks.rglob("*.*"):
        os.utime(file, ns=(0, 0))
    write(tasks / "__pycache__" / "marks.cpython-311.pyc", "written when the task is asked")
    write(tasks / ".cache" / "lock", "taken")
    assert hash_with(task_folder=str(tasks)) == before


def test_a_folder_of_data_that_yaml_names_counts(tasks, tmp_path):
    write(tasks / "local.yaml", f"task: local\ndataset_path: {tmp_path}/copy\n")
    write(tmp_path / "copy" / "data" / "test.parquet", "rows")
    before = hash_with(task_folder=str(tasks))
    write(tmp_path / "copy" / "data" / "test.parquet", "other rows")
    assert hash_with(task_folder=str(tasks)) != before


def test_links_are_followed_and_may_lead_back(tasks, tmp_path):
    (tasks / "back").symlink_to(tasks, target_is_directory=True)
    (tasks / "owner").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    write(tmp_path / "elsewhere" / "name" / "test.jsonl", "{}")
    before = hash_with(task_folder=str(tasks))
    write(tmp_path / "elsewhere" / "name" / "test.jsonl", "{ }")
    assert hash_with(task_folder=str(tasks)) != before


def test_broken_yaml_is_lm_evals_to_refuse(tasks):
    write(tasks / "broken.yaml", "task: [\n\t- {")
    assert hash_with(task_folder=str(tasks))


@pytest.mark.parametrize("source", [DataSource, ModelSource])
def test_folders_count_with_what_lies_deep_inside(tmp_path, source):
    part = {DataSource: "data", ModelSource: "model"}[source]
    file = tmp_path / "copy" / "data" / "train.parquet"
    write(file, "rows")
    before = hash_with(**{part: source(str(tmp_path / "copy"))})
    write(file, "other rows")
    assert hash_with(**{part: source(str(tmp_path / "copy"))}) != before


def test_a_world_that_was_made_again_is_no_other_cell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fingerprint(small_suite()) == []


def test_results_may_not_lie_in_what_is_read(tasks, tmp_path):
    suite = small_suite(task_folder=str(tasks), world=None, model=ModelSource("owner/name"))
    with pytest.raises(runner.NotReadyError, match=r"results lies in .*tasks.*--out outside of it"):
        runner.check_folder(tasks / "results", [cell(suite=suite)])
    assert not (tasks / "results").exists()


@pytest.mark.parametrize("source", [DataSource, ModelSource])
def test_a_file_of_the_same_size_in_a_folder_counts_by_its_time(tmp_path, source):
    part = {DataSource: "data", ModelSource: "model"}[source]
    file = tmp_path / "copy" / "model.safetensors"
    write(file, "weights")
    before = hash_with(**{part: source(str(tmp_path / "copy"))})
    write(file, "WEIGHTS")
    os.utime(file, ns=(0, 0))
    assert hash_with(**{part: source(str(tmp_path / "copy"))}) != before


def test_a_renamed_file_in_a_folder_counts(tmp_path):
    write(tmp_path / "copy" / "train.parquet", "rows")
    before = hash_with(data=DataSource(str(tmp_path / "copy")))
    (tmp_path / "copy" / "train.parquet").rename(tmp_path / "copy" / "test.parquet")
    assert hash_with(data=DataSource(str(tmp_path / "copy"))) != before


def test_renamed_questions_make_another_cell(tasks):
    before = hash_with(task_folder=str(tasks))
    (tasks / "own.jsonl").rename(tasks / "other.jsonl")
    assert hash_with(task_folder=str(tasks)) != before


def test_data_named_from_the_working_directory_count(tasks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "here" / "asked.jsonl", "{}")
    write(tasks / "mine.yaml", "task: mine\ndataset_kwargs: {data_files: here/asked.jsonl}\n")
    before = hash_with(task_folder=str(tasks))
    write(tmp_path / "here" / "asked.jsonl", "{ }")
    assert hash_with(task_folder=str(tasks)) != before


def test_data_that_yaml_in_a_folder_within_names_count(tasks, tmp_path):
    write(
        tasks / "within" / "more.yaml",
        "task: more\ndataset_kwargs: {data_files: ../../far.jsonl}\n",
    )
    write(tmp_path / "far.jsonl", "{}")
    before = hash_with(task_folder=str(tasks))
    write(tmp_path / "far.jsonl", "{ }")
    assert hash_with(task_folder=str(tasks)) != before


def test_files_are_looked_at_once_within_the_context_and_again_after_it(tasks):
    suite = small_suite(task_folder=str(tasks))
    with unchanged():
        before = fingerprint(suite)
        assert fingerprint(small_suite()) != before
        write(tasks / "own.jsonl", "{ }")
        assert fingerprint(suite) == before
    assert fingerprint(suite) != before
