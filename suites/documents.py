"""The table as files: Markdown to read, LaTeX and a figure for a paper, CSV in full precision, and
a page with all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from suites import figures, page
from suites.plan import safe_name
from suites.record import Record, write_whole
from suites.suite import Suite

#: What means something to LaTeX -> how it is written so that it means itself.
_LATEX = str.maketrans(
    {
        **{sign: rf"\{sign}" for sign in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
    }
)

#: Beyond Latin-1, what LaTeX's default encoding has.
SIGNS = "†“”…"


def write(
    suite: Suite,
    tables: dict[str, pd.DataFrame],
    notes: Sequence[str],
    frames: Mapping[str, pd.DataFrame],
    records: Mapping[Path, Record],
    out: Path,
) -> list[Path]:
    """Writes the `tables`, as printed, the `frames` in full precision, a figure, and a page of all.

    `frames` are by what the names of their files have beyond the suite's, which is nothing for the
    one that is drawn; `records` are those in the tables, by their files.
    """
    name = safe_name(suite.name)
    frame = frames[""]
    drawn = figures.draw(frame, suite.name, out / "figures" / name)
    html = out / "tables" / f"{name}.html"
    linked = {page.link(path, html): record for path, record in records.items()}
    figure = next((path for path in drawn if path.suffix == ".png"), None)
    full = {**frames, "": frame.assign(failures=["; ".join(row) for row in frame["failures"]])}
    texts = {
        html.with_suffix(".md"): markdown(tables, notes, suite.name, suite.description),
        html.with_suffix(".tex"): latex(tables, notes, suite.name),
        **{
            html.with_name(f"{name}{more}.csv"): each.to_csv(index=False)
            for more, each in full.items()
            if len(each)
        },
        html: page.html(suite.name, suite.description, tables, notes, linked, figure),
    }
    for path, text in texts.items():
        write_whole(text, path)
    return [*texts, *drawn]


def markdown(
    tables: dict[str, pd.DataFrame], notes: Sequence[str], name: str, description: str
) -> str:
    parts = [f"# {name}", description]
    for title, table in tables.items():
        align = ["left", *["right"] * (len(table.columns) - 1)]
        text = table.to_markdown(index=False, colalign=align, disable_numparse=True)
        parts += [f"## {title}", text]
    return "\n\n".join([*parts, *notes]) + "\n"


def sheet(title: str, table: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """A single table in Markdown, below its title and above the notes."""
    text = table.to_markdown(index=False, disable_numparse=True)
    return "\n\n".join([f"# {title}", text, *notes]) + "\n"


def latex(tables: dict[str, pd.DataFrame], notes: Sequence[str], name: str) -> str:
    """A table environment for each of `tables`, the notes below it; needs booktabs."""
    parts = [r"% \usepackage{booktabs}"]
    small = "\n".join(rf"{escaped(note)}\\" for note in notes)
    below = f"\\par\\raggedright\\footnotesize\n{small}\n\\end{{table}}"
    for title, table in tables.items():
        text = table.map(escaped).to_latex(
            index=False,
            header=[escaped(name) for name in table.columns],
            escape=False,
            column_format="l" + "r" * (len(table.columns) - 1),
            caption=escaped(f"{name}: {title.lower()}"),
            label=f"tab:{safe_name(name)}-{title.lower()}",
        )
        parts.append(text.strip().replace(r"\end{table}", below))
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` with what means something to LaTeX written so that it means itself, minus signs where
    a hyphen stands for one, and question marks for what its usual fonts lack.
    """
    known = "".join(sign if sign in SIGNS or " " <= sign <= "ÿ" else "?" for sign in text)
    spelled = re.sub("-(?=-)", "-{}", known.translate(_LATEX))
    return re.sub(r"(?<![\w-])-(?=[\d.])", "$-$", spelled)
