"""What the README shows runs as it is pasted."""

import re
from pathlib import Path

import torch
from transformers import TrainingArguments

from suites.run import main
from tests.baselines.llama import make_llama

README = Path(__file__).parents[1] / "README.md"


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, loading, loop = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    tokens = [{"input_ids": row, "labels": row} for row in torch.randint(40, (32, 8))]
    arguments = TrainingArguments("run", max_steps=8, report_to=[], use_cpu=True, disable_tqdm=True)
    names = {"base": make_llama(), "args": arguments, "data": tokens}
    exec(first, names)
    trained = names["model"].eval()(names["data"][0]["input_ids"][None]).logits
    names["base"] = make_llama()
    merged = eval(loading, names)
    again = merged.eval()(names["data"][0]["input_ids"][None]).logits
    torch.testing.assert_close(again, trained)

    names["batches"] = [{name: row[None] for name, row in example.items()} for example in tokens]
    names["model"].train()
    exec(loop, names)
    assert names["reselector"].t == len(tokens)


def test_the_list_of_the_readme_is_what_is_printed(capsys):
    assert main(["--list"]) == 0
    assert f"```\n{capsys.readouterr().out}```\n" in README.read_text()
