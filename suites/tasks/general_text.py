"""Scores of the task `general_text`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def byte_likelihood(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """The geometric mean of the probabilities of the document's bytes, in (0, 1).

    With a loss of x nats a byte it is exp(-x); lm-eval's bits per byte are -log2 of it.
    """
    (log_likelihood,) = results
    log_likelihood = getattr(log_likelihood, "log_likelihood", log_likelihood)
    num_bytes = len(doc["page"].encode("utf-8"))
    return {"byte_likelihood": math.exp(log_likelihood / num_bytes)}
