"""The table as files: Markdown to read, LaTeX for a paper, CSV in full precision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from suites.plan import safe_name

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
    tables: dict[str, pd.DataFrame],
    notes: Sequence[str],
    frame: pd.DataFrame,
    stem: Path,
    description: str,
) -> list[Path]:
    """Writes `<stem>.md` and `.tex`, as printed, and `.csv`, in full precision."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        "md": markdown(tables, notes, stem.name, description),
        "tex": latex(tables, notes, stem.name),
        "csv": frame.assign(failures=["; ".join(row) for row in frame["failures"]]).to_csv(
            index=False
        ),
    }
    paths = []
    for ending, text in texts.items():
        paths.append(stem.with_name(f"{stem.name}.{ending}"))
        paths[-1].write_text(text, encoding="utf-8")
    return paths


def markdown(
    tables: dict[str, pd.DataFrame], notes: Sequence[str], name: str, description: str
) -> str:
    parts = [f"# {name}", description]
    for title, table in tables.items():
        align = ["left", *["right"] * (len(table.columns) - 1)]
        text = table.to_markdown(index=False, colalign=align, disable_numparse=True)
        parts += [f"## {title}", text]
    return "\n\n".join([*parts, *notes]) + "\n"


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
    """`text` with what means something to LaTeX written so that it means itself."""
    return text.translate(_LATEX)
