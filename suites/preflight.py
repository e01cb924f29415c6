"""What would fail in cell after cell is looked for before the first: questions, data, sizes."""

from __future__ import annotations

from collections.abc import Sequence

from suites.estimate import meta_model, size_of
from suites.evaluate import check
from suites.formats import texts
from suites.models import load_tokenizer
from suites.plan import Cell
from suites.rows import read_rows
from suites.sources import RANDOM_TOKENS, SPLITS
from suites.suite import Suite


def check_suite(suite: Suite) -> None:
    """Raises ValueError for tasks that cannot be asked, and for rows and a budget that no method
    can do anything with; or what the libraries raise. Rows are read and not tokenised: what comes
    to light by that is left to the cells.
    """
    check([task for split in SPLITS for task in suite.tasks_of(split)], suite.task_folder)
    suite.budget.num_weights(meta_model(suite))
    tokenizer = load_tokenizer(suite.model)
    if suite.data.path != RANDOM_TOKENS and tokenizer is not None:
        texts(read_rows(suite.data), suite.data, tokenizer)


def refusals(suite: Suite, cells: Sequence[Cell]) -> dict[str, str]:
    """Methods of `cells` that cannot have the suite's budget or length of training -> why, with
    the method's name.
    """
    found = {}
    for cell in {cell.method: cell for cell in cells}.values():
        try:
            size_of(cell, suite)
        except ValueError as error:
            why = str(error)
            found[cell.method] = why if why.startswith(cell.method) else f"{cell.method}: {why}"
        except Exception:  # of any class: its cells will tell, and where it comes from
            continue
    return found
