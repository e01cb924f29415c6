"""lm-eval's view of a model in memory, which counts the prompts that it has to cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM


class Harness(HFLM):
    """HFLM that knows of virtual tokens and counts what it cuts.

    A model's virtual tokens, if it has any, leave less room for others; as much as ever where they
    are more than half of what the model has places for.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size
        )
        #: Requests so far (of a question as many as it has answers to choose from) that were
        #: longer than there is room, and lost their beginning.
        self.num_cut = 0
        config = getattr(model, "active_peft_config", None)
        if config is not None and config.is_prompt_learning:
            room = self.max_length - config.num_virtual_tokens
            self._max_length = room if 2 * room > self.max_length else self.max_length

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        # The last token of a continuation is only asked for.
        lengths = [len(context) + len(continuation) - 1 for _, context, continuation in requests]
        self.num_cut += sum(length > self.max_length for length in lengths)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len:
            self.num_cut += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask
