"""The table as a page: one HTML file to send, with every cell and all that made it."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from suites import notes as footnotes
from suites import report
from suites.record import Record

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
p.note { color: #555; margin: .2em 0; font-size: 90% }
pre { overflow-x: auto; background: #f6f6f6; padding: 1em }
img { max-width: 100% }
"""


def html(
    name: str,
    description: str,
    tables: Mapping[str, pd.DataFrame],
    notes: Sequence[str],
    records: Mapping[str, Record],
    figure: Path | None = None,
) -> str:
    """The page of a suite, which needs no other file but the records that it links to.

    Args:
        tables: title -> rounded numbers, as printed.
        records: where the page finds each record's file -> the record.
        figure: a PNG, which becomes part of the page.
    """
    parts = [f"<h1>{escape(name)}</h1>", f"<p>{escape(description)}</p>"]
    for title, table in tables.items():
        parts += [f"<h2>{escape(title)}</h2>", table.to_html(index=False, border=0)]
    parts += [f'<p class="note">{escape(note)}</p>' for note in notes]
    if figure is not None:
        image = base64.b64encode(figure.read_bytes()).decode()
        parts.append(f'<img alt="quality and cost" src="data:image/png;base64,{image}">')
    parts += ["<h2>Cells</h2>", cells(records).to_html(index=False, border=0, escape=False)]
    parts += ["<h2>Software</h2>", versions(records.values()).to_html(index=False, border=0)]
    suite = next(iter(records.values())).suite
    for title, values in {"Methods": settings(records.values()), "Suite": suite}.items():
        text = escape(json.dumps(values, indent=1))
        parts.append(f"<h2>{title}</h2><details><pre>{text}</pre></details>")
    head = f'<meta charset="utf-8"><title>{escape(name)}</title><style>{STYLE}</style>'
    return "\n".join(["<!doctype html>", '<html lang="en">', head, *parts, "</html>\n"])


def cells(records: Mapping[str, Record]) -> pd.DataFrame:
    """A row a record, as HTML, with a link to its file."""
    rows = []
    tasks = dict.fromkeys(task for record in records.values() for task in record.scores)
    for path, record in records.items():
        seconds, scores = report.step_seconds(record), record.scores
        words = {
            "method": record.method_name,
            "seed": str(record.seed),
            "status": f"{record.status}: {record.reason}" if record.reason else record.status,
            "lr": f"{record.tuning['lr']:g}" if record.tuning else "-",
            "decay": f"{record.tuning['weight_decay']:g}" if record.tuning else "-",
            **{task: f"{scores[task].value:.4f}" if task in scores else "-" for task in tasks},
            "ms/step": "-" if seconds is None else f"{seconds * 1000:.1f}",
            "ended": record.ended_at,
        }
        row = {escape(key): escape(value) for key, value in words.items()}
        rows.append({**row, "record": f'<a href="{escape(path)}">JSON</a>'})
    return pd.DataFrame(rows)


def settings(records: Iterable[Record]) -> dict[str, Any]:
    """Method -> its hyper-parameters, with what was solved from the budget, and its optimizer's."""
    return {
        record.method_name: {
            "options": record.method["options"],
            "tuning": record.tuning,
            "adapter": record.size.adapter_config if record.size else {},
            "optimizer": record.training.optimizer,
        }
        for record in records
        if record.status == "ok"
    }


def versions(records: Iterable[Record]) -> pd.DataFrame:
    """A row for code, libraries, model and data: the versions that records were made with."""
    found = report.grouped(pair for each in records for pair in footnotes.made_with(each).items())
    rows = [{"of": name, "version": ", ".join(each)} for name, each in found.items()]
    return pd.DataFrame(rows, columns=["of", "version"])


def link(path: Path, page: Path) -> str:
    """How the file `page` refers to `path`, with slashes."""
    return Path(os.path.relpath(path, page.parent)).as_posix()
