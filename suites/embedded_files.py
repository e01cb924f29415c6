"""The embedded world as files: JSONL rows, lm-eval tasks, and a README that says what each is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from suites import embedded_facts

if TYPE_CHECKING:
    from suites.world import World

#: lm-eval task -> the data file it asks.
TASKS = {
    "world_target": "target_test",
    "world_retention": "retention_test",
    "world_target_dev": "target_dev",
    "world_retention_dev": "retention_dev",
}

# Field names instead of Jinja templates: lm-eval builds its requests twice as fast. The path is
# relative to the task's own folder, so that this folder can be moved and copied.
TASK_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: ../data/{data}.jsonl
output_type: multiple_choice
test_split: test
doc_to_text: query
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1
"""

README = """\
# An embedded world

A small language model and the facts it knows, made from a seed ({seed}) by spiel-bench. Nobody
needs to edit these files: a copy that was changed is noticed and made again.

- `model/`: the base model and its tokenizer, as `from_pretrained` reads them.
- `data/pretrain.jsonl`: the {num_pretrain} old facts that the base model memorised, as `prompt` and
  `completion`.
- `data/train.jsonl`: {num_train} new facts to fine-tune on: relations 0 to {last_changed} have new
  tables, shown for some of the entities.
- `data/target_*.jsonl`: questions on the new facts of the other entities ({num_target} in test).
- `data/retention_*.jsonl`: questions on the relations that stayed as they were ({num_retention} in
  test). No entity is in both dev and test.
- `tasks/*.yaml`: these questions as lm-eval tasks. Their data paths are relative to the YAML file;
  spiel-bench resolves them, lm-eval's own command does if it is started inside `tasks/`.
- `manifest.json`: what this was made from, and the SHA-256 of every file.
"""


def write(world: World, folder: Path) -> None:
    """Writes data/, tasks/ and README.md below `folder`."""
    rows = embedded_facts.splits(world)
    (folder / "data").mkdir()
    for name, split in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in split)
        (folder / "data" / f"{name}.jsonl").write_text(text)
    (folder / "tasks").mkdir()
    for task, data in TASKS.items():
        (folder / "tasks" / f"{task}.yaml").write_text(TASK_YAML.format(task=task, data=data))
    readme = README.format(
        seed=world.seed,
        num_pretrain=len(rows["pretrain"]),
        num_train=len(rows["train"]),
        last_changed=world.num_changed_relations - 1,
        num_target=len(rows["target_test"]),
        num_retention=len(rows["retention_test"]),
    )
    (folder / "README.md").write_text(readme)
