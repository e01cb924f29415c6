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


def write(
    suite: Suite,
    tables: dict[str, pd.DataFrame],
    notes: Sequence[str],
    frame: pd.DataFrame,
    records: Mapping[Path, Record],
    out: Path,
) -> list[Path]:
    """Writes the `tables`, as printed, `frame` in full precision, a figure, and a page of all.

    `records` are those in the tables, by their files.
    """
    stem = out / "tables" / safe_name(suite.name)
    drawn = figures.draw(frame, suite.name, out / "figures" / stem.name)
    ending = {kind: stem.with_name(f"{stem.name}.{kind}") for kind in ("md", "tex", "csv", "html")}
    linked = {page.link(path, ending["html"]): record for path, record in records.items()}
    figure = next((path for path in drawn if path.suffix == ".png"), None)
    full = frame.assign(failures=["; ".join(row) for row in frame["failures"]])
    texts = {
        "md": markdown(tables, notes, suite.name, suite.description),
        "tex": latex(tables, notes, suite.name),
        "csv": full.to_csv(index=False),
        "html": page.html(suite.name, suite.description, tables, notes, linked, figure),
    }
    for kind, text in texts.items():
        write_whole(text, ending[kind])
    return [*ending.values(), *drawn]


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
    """A table environment for each of `tables`, the notes below the last; needs booktabs."""
    parts = [r"% \usepackage{booktabs}"]
    for title, table in tables.items():
        text = table.map(escaped).to_latex(
            index=False,
            header=[escaped(name) for name in table.columns],
            escape=False,
            column_format="l" + "r" * (len(table.columns) - 1),
            caption=escaped(f"{name}: {title.lower()}"),
            label=f"tab:{safe_name(name)}-{title.lower()}",
        )
        parts.append(text.strip())
    small = "\n".join(rf"{escaped(note)}\\" for note in notes)
    parts[-1] = parts[-1].replace(
        r"\end{table}", f"\\par\\raggedright\\footnotesize\n{small}\n\\end{{table}}"
    )
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` with what means something to LaTeX written so that it means itself, and minus signs
    where a hyphen stands for one.
    """
    return re.sub(r"(?<![\w-])-(?=[\d.])", "$-$", text.translate(_LATEX))
