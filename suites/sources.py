"""Where a suite's model, training data and questions come from.

Nothing here imports torch: `--help` and `--list` read suites and must answer at once.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Literal

from suites.values import added, require

DTYPES = ("float32", "bfloat16", "float16")
SPLITS = ("dev", "test")
ROLES = ("target", "retention")
QUANTIZATIONS = ("4bit",)

#: Endings of data files; JSON is one object a line in either.
LINES, TABLES = (".jsonl", ".json"), (".parquet",)

#: What the path of data may be.
ALLOWED = f"a {', '.join((*LINES, *TABLES))} file, a folder or a hub id, as owner/name"

#: The path of data that are random token ids, for suites that measure time and memory only.
RANDOM_TOKENS = "{random tokens}"


@dataclass(frozen=True)
class ModelSource:
    """Where the base model comes from, and the form its weights are held in.

    `path` is a hub id, a local folder or, with `shape_only`, also a name in `suites.shapes.SHAPES`.
    """

    path: str
    dtype: str = "bfloat16"
    #: "4bit": bitsandbytes' NF4 with double quantisation, computing in `dtype`.
    quantize: Literal["4bit"] | None = added(None)
    #: Random weights in the real shapes: for time and memory, nothing else.
    shape_only: bool = added(False)
    #: Whether Python code that lies beside the weights may be executed.
    trust_remote_code: bool = added(False)
    #: Of a hub id: its commit, tag or branch; None is the newest of its main branch.
    revision: str | None = added(None)

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        require(
            self.quantize is None or self.quantize in QUANTIZATIONS,
            f"quantize {self.quantize!r} is not one of {', '.join(QUANTIZATIONS)}",
        )


@dataclass(frozen=True)
class DataSource:
    """Training examples: a JSONL or parquet file, a folder or hub id, or RANDOM_TOKENS.

    A row is either a conversation, in the column `messages`: a list of {role, content}, of which
    the assistant's turns are learnt; or a prompt and its completion, made from its columns by the
    templates `prompt` and `completion`, of which the completion and an EOS are learnt. If the
    templates' columns are all there, they are used; otherwise `messages`, otherwise plain
    `prompt` and `completion`. A line of a template that is one {column} alone is left out where
    that column is empty.
    """

    path: str
    #: In tokens; what is longer is cut at its end.
    max_length: int = 2048
    #: Of a folder or hub id: its split, and its subset if it has several.
    split: str = added("train")
    subset: str | None = added(None)
    #: Rows taken, chosen by `choice_seed` and kept in order; None, or more than there are, is all.
    num_examples: int | None = added(None)
    choice_seed: int = added(0)
    messages: str = added("messages")
    prompt: str = added("{prompt}")
    completion: str = added("{completion}")
    #: False learns the prompt, or the whole conversation, too.
    mask_prompt: bool = added(True)
    #: Rows whose text is longer, in characters, are dropped.
    max_characters: int | None = added(None)
    #: Of a hub id: its commit, tag or branch; None is the newest of its main branch.
    revision: str | None = added(None)

    def __post_init__(self) -> None:
        for name in ("max_length", "num_examples", "max_characters"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name} must be positive, got {value}")
        require(bool(self.columns), f"no column is named in {self.prompt!r} or {self.completion!r}")
        require(
            self.path != RANDOM_TOKENS or self.num_examples is not None,
            "random tokens need num_examples",
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the templates name, each once."""
        pieces = [*template_pieces(self.prompt), *template_pieces(self.completion)]
        return tuple(dict.fromkeys(column for _, column in pieces if column is not None))


def template_pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as texts, each with the column that follows it or None.

    Raises ValueError for braces that do not enclose a column's plain name.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}") from error
    for _, column, form, conversion in parts:
        plain = column is None or (column and not set(column) & set(".[]"))
        require(
            bool(plain) and not form and not conversion,
            f"template {template!r}: allowed between braces is the name of a column, as {{query}}",
        )
    return [(text, column) for text, column, _, _ in parts]


@dataclass(frozen=True)
class Task:
    """One lm-eval task, group or tag, and the metric read from it, by lm-eval's key (`acc,none`).

    `role` is what its score says of a method: `target` is what the fine-tuning was for,
    `retention` what the base model could do before.
    """

    name: str
    metric: str
    role: Literal["target", "retention"]
    split: Literal["dev", "test"] = "test"
    num_fewshot: int | None = None
    #: The split of the task's data that is asked, where it is not the task's own choice.
    data_split: str | None = added(None)
    apply_chat_template: bool = added(False)
    #: It runs code that the model wrote, so it needs `Suite.allow_code_execution`.
    runs_code: bool = added(False)

    def __post_init__(self) -> None:
        require(self.role in ROLES, f"role {self.role!r} is not one of {', '.join(ROLES)}")
        require(self.split in SPLITS, f"split {self.split!r} is not one of {', '.join(SPLITS)}")
