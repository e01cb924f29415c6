"""Models and tokenizers, from a local folder or from the hub, by the same from_pretrained.

A folder that exists is always meant before a hub repository of the same name.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from suites.suite import ModelSource

#: The hub's rule for repository ids: "name" or "owner/name".
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

HUB_TIMEOUT_SECONDS = 3

log = logging.getLogger(__name__)


def load_model(source: ModelSource, device: str) -> PreTrainedModel:
    """The causal language model of `source` in its dtype, on `device`, in evaluation mode.

    Raises ValueError if there is none, see `whereabouts`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = whereabouts(source.path)
    model = AutoModelForCausalLM.from_pretrained(
        source.path, dtype=getattr(torch, source.dtype), **options
    )
    return model.to(device)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model, able to pad: with EOS where it has no padding token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.path, **whereabouts(source.path))
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {source.path} has no EOS token, which ends an example")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def whereabouts(path: str) -> dict[str, bool]:
    """What from_pretrained has to be told to find `path`, checked before it tries for long.

    The answer for a local folder, or for a hub repository that is in the hub's cache while the
    hub is out of reach, is {"local_files_only": True}. Raises ValueError if `path` is neither a
    folder, nor cached, nor a repository that the hub lets us read.
    """
    if path and Path(path).is_dir():  # Path("") is the working directory
        if not (Path(path) / "config.json").is_file():
            raise ValueError(f"{path} is a folder without config.json, so it holds no model")
        return {"local_files_only": True}
    if not HUB_ID.fullmatch(path):
        raise ValueError(f"model path {path!r} is neither a folder nor a hub id, as owner/name")

    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        HfApi().model_info(path, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # offline errors have no class in common, not even OSError
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            log.warning("the hub cannot be asked for %s, its cached copy is used", path)
            return {"local_files_only": True}
        raise ValueError(
            f"model {path} cannot be had from the hub ({type(error).__name__}) and is not in its "
            "cache; the path of a local model folder would do instead"
        ) from error
    return {}
