"""lm-eval's tasks by name: groups, tags, a user's own, and how their scores come together."""

import copy
import time
from pathlib import Path

import pytest

from suites import questions, report, stats
from suites.evaluate import check, evaluate
from suites.models import load_model, load_tokenizer
from suites.suite import ModelSource, Task
from suites.tasks import general_text, gsm8k_metamath
from tests.suites import hub_files
from tests.suites.arena import cell, finished


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    source = ModelSource(str(hub_files.write_model(tmp_path_factory.mktemp("model"))), "float32")
    return load_model(source, "cpu"), load_tokenizer(source)


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(cache))


def test_built_in_tasks_are_found_fast_and_name_their_data():
    questions.subtasks("gsm8k", None)  # imports lm-eval
    started = time.monotonic()
    counts = {
        name: len(questions.subtasks(name, None))
        for name in ("mmlu", "tydiqa_goldp", "gsm8k_cot", "bbh_cot_fewshot", "humaneval")
    }
    assert time.monotonic() - started < 6
    assert counts == {
        "mmlu": 57,
        "tydiqa_goldp": 9,
        "gsm8k_cot": 1,
        "bbh_cot_fewshot": 27,
        "humaneval": 1,
    }
    assert questions.hub_data("mmlu", None) == ["cais/mmlu"]
    assert questions.hub_data("general_text", None) == ["EleutherAI/wikitext_document_level"]


def test_a_copy_in_the_task_folder_stands_for_the_hub(tmp_path):
    (tmp_path / "cais" / "mmlu").mkdir(parents=True)
    assert questions.hub_data("mmlu", str(tmp_path)) == []
    assert questions.hub_data("gsm8k", str(tmp_path)) == ["openai/gsm8k"]


TASK = """\
task: {name}
{extra}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {name}.jsonl, validation: {name}.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: validation
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def folder(tmp_path):
    """Two tasks of 2 and 6 questions, together in two groups and a tag."""
    for name, count, extra in (("few", 2, "tag: both_tag"), ("many", 6, "tag: both_tag")):
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, extra=extra))
        rows = hub_files.mmlu([name], count)[name]["test"]
        hub_files.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    aggregate = "aggregate_metric_list: [{{metric: acc, weight_by_size: {}}}]\n"
    for name, by_size in (("by_size", True), ("by_task", False)):
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [few, many]\n" + aggregate.format(by_size)
        )
    (tmp_path / "nested.yaml").write_text("group: nested\ntask: [both_tag]\nnum_fewshot: 1\n")
    (tmp_path / "odd.yaml").write_text("group: odd\ntask: [{task: new, doc_to_text: x}]\n")
    return str(tmp_path)


def score(loaded, name, folder, metric="acc,none", **options):
    task = Task(name, metric, "target", **options)
    return evaluate(*loaded, [task], folder, 4)[name]


def test_a_group_counts_items_alike_if_it_says_so_and_else_subtasks(loaded, folder):
    few, many = (score(loaded, name, folder) for name in ("few", "many"))
    assert few.value != many.value  # else this would test nothing
    by_size = score(loaded, "by_size", folder)
    assert by_size.per_item == few.per_item + many.per_item
    assert by_size.doc_ids == (0, 1, 0, 1, 2, 3, 4, 5)
    assert by_size.subtasks == {"few": 2, "many": 6}
    assert by_size.value == pytest.approx((2 * few.value + 6 * many.value) / 8)
    for name in ("by_task", "both_tag", "nested"):
        assert score(loaded, name, folder).value == pytest.approx((few.value + many.value) / 2)


def lm_evals(loaded, name, folder):
    """The group's value by lm-eval alone."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tokenizer = loaded
    manager = TaskManager(include_path=folder, include_defaults=False)
    harness = HFLM(pretrained=model, tokenizer=tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # lm-eval looks for data files from the working directory
        found = simple_evaluate(harness, tasks=[name], task_manager=manager, bootstrap_iters=0)
    return found["groups"][name]["acc,none"]


def test_a_groups_value_is_lm_evals(loaded, folder):
    for name in ("by_size", "by_task"):
        value = lm_evals(loaded, name, folder)
        assert score(loaded, name, folder).value == pytest.approx(value)


@pytest.mark.parametrize("name", ["by_size", "by_task"])
def test_a_paired_difference_is_that_of_lm_evals_values(loaded, folder, name):
    model, tokenizer = loaded
    other = copy.deepcopy(model)
    other.lm_head.weight.data[tokenizer(" four")["input_ids"][1:]] += 5.0  # says it everywhere
    both = (loaded, (other, tokenizer))
    here, there = (lm_evals(each, name, folder) for each in both)
    assert here != there  # else this would test nothing
    records = [finished(cell(), scores={name: score(each, name, folder)}) for each in both]
    paired = report.item_differences(records[:1], records[1:], "target")
    assert stats.paired_difference(*paired).mean == pytest.approx(here - there)


def test_examples_before_the_question_are_each_tasks_own(loaded, folder):
    tasks = [
        Task("few", "acc,none", "target", num_fewshot=2),
        Task("many", "acc,none", "target", num_fewshot=0),
    ]
    loads = [questions.load(task, folder)[task.name] for task in tasks]
    assert [task.config.num_fewshot for task in loads] == [2, 0]
    both = evaluate(*loaded, tasks, folder, 4)
    assert both["many"] == score(loaded, "many", folder)


def test_a_chat_template_is_applied_where_asked_for(loaded, folder, monkeypatch):
    _, tokenizer = loaded
    seen = []
    monkeypatch.setattr(
        type(tokenizer),
        "apply_chat_template",
        lambda self, messages, **options: seen.append(messages) or "<|user|>\n",
    )
    score(loaded, "few", folder)
    assert not seen
    score(loaded, "few", folder, apply_chat_template=True)
    assert {message["role"] for messages in seen for message in messages} >= {"user"}


def test_a_subtask_that_lacks_the_metric_is_known_before_training(folder):
    """One subtask of each kind is asked."""
    path = Path(folder, "many.yaml")
    assert questions.one_of_each_kind("both_tag", folder) == ["few"]
    path.write_text(path.read_text().replace("metric: acc,", "metric: exact_match,"))
    assert questions.one_of_each_kind("both_tag", folder) == ["few", "many"]
    with pytest.raises(ValueError, match="task many has no metric 'acc,none'; it has: exact_match"):
        check([Task("both_tag", "acc,none", "target")], folder)


def test_a_metric_that_is_no_mean_is_known_before_training(folder):
    path = Path(folder, "few.yaml")
    path.write_text(path.read_text().replace("metric: acc, aggregation: mean", "metric: mcc"))
    with pytest.raises(ValueError, match="metric 'mcc,none' of task few is no mean over items"):
        check([Task("few", "mcc,none", "target")], folder)


OWN_MARKS = """\
def strict(doc, results):
    return {"mark": 1.0} if results[0] == "right" else {"unread": 1.0}

def failing(doc, results):
    raise RuntimeError("no such answer")
"""


@pytest.mark.parametrize(
    ("function", "metric", "refused"),
    [
        ("strict", "mark,none", False),  # what is listed is believed, whatever a guess gets
        ("strict", "marc,none", True),
        ("failing", "marc,none", False),  # not known before training
    ],
)
def test_a_tasks_own_function_for_results(folder, function, metric, refused):
    Path(folder, "marks.py").write_text(OWN_MARKS)
    Path(folder, "own.yaml").write_text(
        TASK.format(name="own", extra=f"process_results: !function marks.{function}")
        .replace("multiple_choice", "generate_until")
        .replace("metric: acc", "metric: mark")
        .replace("own.jsonl", "few.jsonl")
    )
    tasks = [Task("own", metric, "target")]
    if not refused:
        check(tasks, folder)
        return
    with pytest.raises(ValueError, match="task own has no metric 'marc,none'"):
        check(tasks, folder)


def test_nothing_is_run_to_check_a_task_that_runs_code(folder, monkeypatch):
    monkeypatch.setattr(questions, "load", None)
    check([Task("few", "pass@1,none", "target", runs_code=True)], folder)


def test_a_missing_metric_names_those_there_are(loaded, folder):
    with pytest.raises(ValueError, match=r"task few has no metric 'f1,none'; it has: acc,none"):
        score(loaded, "both_tag", folder, metric="f1,none")


def test_an_unknown_task_names_the_nearest(folder):
    with pytest.raises(ValueError, match=r"has no task 'fewest'; nearest: few"):
        questions.subtasks("fewest", folder)


def test_a_group_that_makes_up_tasks_is_refused(folder):
    with pytest.raises(ValueError, match="group odd names 'new', which is no task on its own"):
        questions.subtasks("odd", folder)


def test_data_out_of_reach_are_named(loaded, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="task gsm8k: its data openai/gsm8k cannot be loaded"):
        score(loaded, "gsm8k", None, "exact_match,strict-match")


def test_generated_code_does_not_run_unless_allowed(loaded):
    with pytest.raises(ValueError, match="task humaneval runs code that the model wrote"):
        score(loaded, "humaneval", None, "pass@1,create_test", runs_code=True)


@pytest.mark.parametrize(
    ("said", "right", "mark"),
    [
        (" 2 + 2 = 4. The answer is: 4", "#### 4", 1.0),
        ("The answer is: 4.0\nand more", "#### 4", 1.0),
        ("#### 5. The answer is: 1/2", "#### 0.5", 1.0),
        ("The answer is $7.", "so\n#### 7", 1.0),
        ("The final answer is 50%", "#### 50", 1.0),
        ("The answer is: 5", "#### 4", 0.0),
        ("4", "#### 4", 0.0),
        ("The answer is: 1/0", "#### 4", 0.0),
    ],
)
def test_metamath_marks_as_peft_does(said, right, mark):
    assert gsm8k_metamath.process_results({"answer": right}, [said]) == {"acc": mark}


def test_byte_likelihood_is_that_of_a_byte():
    marks = general_text.byte_likelihood({"page": "abcd"}, [-8.0])
    assert marks == {"byte_likelihood": pytest.approx(0.1353, abs=1e-4)}


def test_a_group_of_other_items_has_another_hash(loaded, folder):
    before = score(loaded, "by_size", folder).items_hash
    assert before == score(loaded, "by_task", folder).items_hash != ""
    path = Path(folder) / "few.jsonl"
    path.write_text(path.read_text().replace("Which", "What"))
    assert score(loaded, "by_size", folder).items_hash != before


def test_what_an_outer_group_says_counts_more_and_what_a_group_says_of_one_task_most(folder):
    (Path(folder) / "inner.yaml").write_text(
        "group: inner\ntask: [few, {task: many, num_fewshot: 3}]\nnum_fewshot: 1\n"
    )
    (Path(folder) / "outer.yaml").write_text("group: outer\ntask: [inner]\nnum_fewshot: 2\n")
    found = {leaf.name: leaf.said["num_fewshot"] for leaf in questions.subtasks("outer", folder)}
    assert found == {"few": 2, "many": 3}


def test_the_examples_before_a_question_are_the_same_each_time(loaded, folder):
    asked = [score(loaded, "many", folder, num_fewshot=2).items_hash for _ in range(3)]
    assert len(set(asked)) == 1


def test_a_group_weighs_each_metric_as_it_says(folder):
    (Path(folder) / "two.yaml").write_text(
        "group: two\ntask: [few, many]\naggregate_metric_list:\n"
        "- {metric: acc, weight_by_size: false}\n- {metric: acc_norm, weight_by_size: true}\n"
    )
    weighed = [
        questions.weighs_by_size(Task("two", f"{metric},none", "target"), folder)
        for metric in ("acc", "acc_norm")
    ]
    assert weighed == [False, True]


def test_a_task_of_the_users_comes_before_one_of_ours(folder):
    text = (Path(folder) / "few.yaml").read_text().replace("task: few", "task: general_text")
    (Path(folder) / "mine.yaml").write_text(text)
    (leaf,) = questions.subtasks("general_text", folder)
    assert leaf.folder == Path(folder)


def test_what_else_a_task_says_of_its_data_files_is_kept(folder):
    path = Path(folder) / "few.yaml"
    path.write_text(path.read_text().replace("dataset_kwargs: {", "dataset_kwargs: {field: rows, "))
    (leaf,) = questions.subtasks("few", folder)
    kwargs = questions._data(leaf, folder)["dataset_kwargs"]
    assert kwargs["field"] == "rows"
    assert kwargs["data_files"]["test"] == str((Path(folder) / "few.jsonl").resolve())


def test_tasks_that_filter_otherwise_are_of_another_kind(folder):
    path = Path(folder) / "many.yaml"
    path.write_text(
        path.read_text() + "filter_list: [{name: own, filter: [{function: take_first}]}]\n"
    )
    assert questions.one_of_each_kind("by_size", folder) == ["few", "many"]
