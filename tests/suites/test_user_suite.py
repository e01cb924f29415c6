"""A suite in a file of the user's: the documented example runs, and mistakes are named."""

import re
import textwrap
from pathlib import Path

import pytest

from suites.methods import METHODS
from suites.plan import Cell, Execution
from suites.suite import Task
from suites.user_suite import is_file, load_suite
from tests.suites import hub_files

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


def example() -> str:
    """The suite file that the guide shows."""
    (found,) = re.findall(r"```python\n(.*?SUITE = .*?)```", GUIDE.read_text(), re.DOTALL)
    return found


def test_the_documented_example_runs(tmp_path, monkeypatch):
    from suites import cell
    from suites.distributed import Rank

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert len(example().strip().split("\n")) <= 14
    small = example().replace("num_steps=1000", "num_steps=6").replace("rank=16", "rank=4")
    Path("my_suite.py").write_text(small)
    hub_files.write_model(Path("my_model"))
    hub_files.write_jsonl(Path("my_data.jsonl"), hub_files.conversations())
    Path("my_tasks").mkdir()
    hub_files.write_repository(Path("my_tasks"), "openai/gsm8k", hub_files.gsm8k())
    suite = load_suite("my_suite.py")
    assert suite.recipe.num_steps == 6
    planned = Cell(suite, "spiel", METHODS["spiel"], suite.tunings["spiel"], 0)
    way = Execution(save_seconds=None)
    done = cell.run(planned, None, tmp_path, way, Rank(), lambda report: None)
    assert done.status == "ok", done.reason
    assert set(done.scores) == {task.name for task in suite.tasks}


def test_the_documented_task_can_be_asked(tmp_path, monkeypatch):
    from suites.evaluate import check

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (text,) = re.findall(r"```yaml\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    Path("my_tasks").mkdir()
    Path("my_tasks/sums.yaml").write_text(textwrap.dedent(text))
    row = {"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}
    hub_files.write_jsonl(Path("my_tasks/sums.jsonl"), [row])
    check([Task("sums", "acc,none", "target")], "my_tasks")
    with pytest.raises(ValueError, match="sums has no metric 'f1,none'; it has: acc,none"):
        check([Task("sums", "f1,none", "target")], "my_tasks")


def test_only_python_files_are_suites():
    assert is_file("path/to/my_suite.py")
    assert not is_file("quickstart")


def test_the_file_may_define_classes_of_its_own(tmp_path):
    path = tmp_path / "mine.py"
    own = "import dataclasses\n@dataclasses.dataclass\nclass Own:\n    size: int = 1\n"
    path.write_text(f"from __future__ import annotations\n{own}{example()}")
    assert load_suite(path).name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"suite file .*mine\.py is not there"),
        ("SUITE = 1 +", "fails: SyntaxError"),
        ("import no_such_module", "fails: ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "SUITE must be a suites.suite.Suite, it is not there"),
        ("SUITE = 'quickstart'", "SUITE must be a suites.suite.Suite, it is a str"),
    ],
)
def test_a_file_without_a_suite_is_refused(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_suite(path)
