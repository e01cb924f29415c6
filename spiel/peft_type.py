"""Makes SPIEL known to peft, which has no plug-in hook for methods from outside."""

from __future__ import annotations

from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "SPIEL"


def add_peft_type() -> PeftType:
    """Adds the member SPIEL to peft's enum of methods, once, and returns it.

    Everything in peft that reads a saved `peft_type` looks it up in that enum, so a plain string
    in its tables would load in some places and not in others.
    """
    if NAME in PeftType.__members__:
        return PeftType(NAME)
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_map_[NAME] = member
    PeftType._member_names_.append(NAME)
    PeftType._value2member_map_[NAME] = member
    return member


def register(config_cls: type, model_cls: type) -> None:
    """Enters SPIEL into peft's tables of configs, tuners and prefixes, once."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    if add_peft_type() not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
