"""A method from a file: any method of peft, as its `adapter_config.json` describes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: The field with this value is solved from the budget.
SOLVED = "budget"

#: Fields that say where an adapter came from, and not what it is.
HISTORY = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "revision",
    "task_type",
)


def read(path: Path) -> tuple[str, str | None, dict[str, Any]]:
    """peft's name of the method, the field that is solved from the budget, and the other fields.

    At most one field has the value "budget" instead of its own. `target_modules` that are left
    out are the budget's. Raises ValueError, with `path`, if it is missing or broken, or if peft
    does not know the method (the message lists those it does), a field, or a value.
    """
    values = _read_json(path)
    peft_type = values.pop("peft_type")
    knobs = [name for name, value in values.items() if value == SOLVED]
    if len(knobs) > 1:
        raise ValueError(f"{path}: only one field can be {SOLVED!r}, not {' and '.join(knobs)}")
    config = {
        name: value for name, value in values.items() if name not in HISTORY and name not in knobs
    }
    knob = knobs[0] if knobs else None
    _check(path, peft_type, config | ({knob: 1} if knob else {}))
    return peft_type, knob, config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict) or not isinstance(values.get("peft_type"), str):
        raise ValueError(f'{path} has no "peft_type", as "LORA"')
    return values


def _refuse(constant: str) -> None:
    """Of NaN and the infinities, which Python reads and no record can hold."""
    raise ValueError(f"{constant} is no number")


def _check(path: Path, peft_type: str, config: dict[str, Any]) -> None:
    if peft_type == "SPIEL":  # known to peft if spiel is imported, but AdamW can't train it
        raise ValueError(f"{path}: for SPIEL use the methods spiel and spiel-ma")
    from baselines.adapter import make_config

    try:
        make_config(peft_type, config, ("q_proj",))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
