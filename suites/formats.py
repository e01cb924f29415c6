"""Rows -> texts, each with the stretches of it that are learnt: conversations and completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suites.sources import template_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from suites.rows import Rows
    from suites.sources import DataSource

#: Stands for a message's content where that content is looked for; in no text.
MARK = "\x00\x01\x00"

#: messages, whether the assistant's header follows -> text.
Render = Callable[[Sequence[Mapping[str, str]], bool], str]


@dataclass(frozen=True)
class Text:
    """One example as text."""

    text: str
    #: [start, end) in characters, of what is learnt.
    targets: tuple[tuple[int, int], ...]
    #: Whether an EOS follows, learnt as part of the last target.
    ends: bool


def texts(rows: Rows, source: DataSource, tokenizer: PreTrainedTokenizerBase) -> list[Text]:
    """Every row as a Text, in the form that the first row's columns decide.

    Raises ValueError that names the line for a row without its columns or of other types.
    """
    write = _form(rows, source, tokenizer)
    whole = not source.mask_prompt
    found = []
    for index, row in enumerate(rows.values):
        text = write(row, rows.where(index))
        if not _is_unicode(text.text):
            raise ValueError(f"{rows.where(index)}: it has half a surrogate pair, which is no text")
        found.append(Text(text.text, ((0, len(text.text)),), text.ends) if whole else text)
    return found


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _form(
    rows: Rows, source: DataSource, tokenizer: PreTrainedTokenizerBase
) -> Callable[[Mapping[str, Any], str], Text]:
    own, plain = source, dataclasses.replace(source, prompt="{prompt}", completion="{completion}")
    there = set(rows.values[0])
    if not set(own.columns) <= there and source.messages in there:
        return Conversation(source.messages, _renderer(tokenizer))
    for form in (own, plain):
        if set(form.columns) <= there:
            templates = Template.of(form.prompt), Template.of(form.completion)
            return Completion(*templates, form.columns)
    ways = [" and ".join(own.columns), source.messages, " and ".join(plain.columns)]
    raise ValueError(
        f"{rows.where(0)}: columns are missing; needed: {', or '.join(dict.fromkeys(ways))}; "
        f"there: {', '.join(rows.values[0]) or 'none'}"
    )


@dataclass(frozen=True)
class Template:
    """A text with columns in it, a sequence of pieces for each of its lines."""

    lines: tuple[tuple[tuple[str, str | None], ...], ...]

    @classmethod
    def of(cls, template: str) -> Template:
        return cls(tuple(tuple(template_pieces(line)) for line in template.split("\n")))

    def fill(self, row: Mapping[str, str]) -> str:
        filled = []
        for line in self.lines:
            values = [text + ("" if name is None else row[name]) for text, name in line]
            alone = len(self.lines) > 1 and len(line) == 1 and line[0][1] is not None
            if values != [""] or not alone:
                filled.append("".join(values))
        return "\n".join(filled)


@dataclass(frozen=True)
class Completion:
    """A prompt and what should follow it."""

    prompt: Template
    completion: Template
    columns: tuple[str, ...]

    def __call__(self, row: Mapping[str, Any], where: str) -> Text:
        for name in self.columns:
            if name not in row:
                raise ValueError(
                    f"{where}: field {name!r} is missing; needed: {', '.join(self.columns)}; "
                    f"there: {', '.join(row) or 'none'}"
                )
            if not isinstance(row[name], str):
                kind = type(row[name]).__name__
                raise ValueError(f"{where}: field {name!r} must be a string, got {kind}")
        prompt = self.prompt.fill(row)
        whole = prompt + self.completion.fill(row)
        targets = ((len(prompt), len(whole)),) if len(prompt) < len(whole) else ()
        return Text(whole, targets, ends=True)


@dataclass(frozen=True)
class Conversation:
    """Messages in the tokenizer's chat template; the assistant's turns are learnt.

    A turn is what the template adds to the conversation before it, from the end of the header
    that it would prompt the assistant with, to the mark that ends the turn.
    """

    column: str
    render: Render

    def __call__(self, row: Mapping[str, Any], where: str) -> Text:
        messages = _messages(row, self.column, where)
        try:
            whole = self.render(messages, False)
            targets = [
                self._turn(messages, index, whole)
                for index, message in enumerate(messages)
                if message["role"] == "assistant"
            ]
        except Exception as error:  # a template raises what it likes
            first = str(error).strip().split("\n")[0]
            raise ValueError(f"{where}: the chat template refuses it: {first}") from error
        return Text(whole, tuple(turn for turn in targets if turn[0] < turn[1]), ends=False)

    def _turn(
        self, messages: Sequence[Mapping[str, str]], index: int, whole: str
    ) -> tuple[int, int]:
        before = self.render(messages[:index], True) if index else ""
        last = index == len(messages) - 1
        after = whole if last else self.render(messages[: index + 1], False)
        start, end = _shared(before, whole), _shared(after, whole)
        kept = start == len(before) or whole.startswith(self.render(messages[:index], False))
        if kept and end >= len(after.rstrip()):
            return start, end
        return self._turn_by_content(messages, index, whole)

    def _turn_by_content(
        self, messages: Sequence[Mapping[str, str]], index: int, whole: str
    ) -> tuple[int, int]:
        """The turn in a template that writes it otherwise once more turns follow.

        Its content is where the conversation differs from the same one with other content.
        """
        start, end = self._content(messages, index, whole)
        alone = self.render(messages[: index + 1], False)
        closing = alone[self._content(messages[: index + 1], index, alone)[1] :]
        return start, end + _shared(closing, whole[end:])

    def _content(
        self, messages: Sequence[Mapping[str, str]], index: int, whole: str
    ) -> tuple[int, int]:
        changed = {**messages[index], "content": MARK}
        other = self.render([*messages[:index], changed, *messages[index + 1 :]], False)
        start = _shared(whole, other)
        tail = _shared(whole[start:][::-1], other[start:][::-1])
        return start, len(whole) - tail


def _messages(row: Mapping[str, Any], column: str, where: str) -> list[dict[str, str]]:
    """The messages of `row`, checked: a list of {role, content}, both strings."""
    messages = row.get(column)
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f"{where}: field {column!r} must be a list of messages, got {kind}")
    for number, message in enumerate(messages, start=1):
        fields = message if isinstance(message, dict) else {}
        for name in ("role", "content"):
            if not isinstance(fields.get(name), str):
                raise ValueError(f"{where}: message {number} has no string {name!r}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _renderer(tokenizer: PreTrainedTokenizerBase) -> Render:
    def render(messages: Sequence[Mapping[str, str]], header: bool) -> str:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=header
        )
        assert isinstance(text, str)  # as it is not tokenised
        return text

    return render


def _shared(a: str, b: str) -> int:
    """The length of what `a` and `b` begin with alike."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
