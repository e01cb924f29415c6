"""SpIEL: sparse fine-tuning of large language models, as a PEFT method.

Importing this package registers SPIEL with peft. Paper: arXiv 2401.16405.
"""

from spiel.callback import SpielCallback
from spiel.config import SpielConfig
from spiel.model import SpielModel, get_deltas, set_support
from spiel.optim import SpielAdamW
from spiel.peft_type import register
from spiel.reselector import Reselector
from spiel.sm3 import SpielSM3

__all__ = [
    "Reselector",
    "SpielAdamW",
    "SpielCallback",
    "SpielConfig",
    "SpielModel",
    "SpielSM3",
    "get_deltas",
    "set_support",
]

register(SpielConfig, SpielModel)
