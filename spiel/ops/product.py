"""Product: an operand of a weight's gradient that a kernel may form as it reads the factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class Product:
    """one * others[0] * others[1] and so on, from the left, formed only where it has to be.

    Attributes:
        one: [tokens, n].
        others: factors that are broadcast to that.
        kinds: of each of them, whether it is "entries" [tokens, n], "tokens" [tokens, 1] or
            "columns" [1, n].
        shape: (tokens, n).
    """

    def __init__(
        self, one: torch.Tensor, others: Sequence[torch.Tensor], kinds: Sequence[str]
    ) -> None:
        self.one, self.others, self.kinds = one, tuple(others), tuple(kinds)
        self.shape = one.shape

    @classmethod
    def of(cls, factors: Sequence[torch.Tensor]) -> Product | None:
        """Of factors as they stand in a model: the first one [..., n], to which the others are
        broadcast. None if there are no others, if the product has another shape or dtype, or if
        they are of other kinds.
        """
        one, *others = factors
        if one.dim() == 0:
            return None
        *leading, n = one.shape
        known = {
            (n,): ("columns", (1, n)),
            (*leading, 1): ("tokens", (-1, 1)),
            (*leading, n): ("entries", (-1, n)),
        }
        is_known = [other.shape in known and other.dtype == one.dtype for other in others]
        if not is_known or not all(is_known):
            return None
        kinds, shapes = zip(*(known[other.shape] for other in others), strict=True)
        reshaped = [other.reshape(shape) for other, shape in zip(others, shapes, strict=True)]
        return cls(one.reshape(-1, n), reshaped, kinds)

    def form(self) -> torch.Tensor:
        """The product [tokens, n], made once; lets go of the factors."""
        with torch.no_grad():
            for other in self.others:
                self.one = self.one * other
        self.others = self.kinds = ()
        return self.one


#: What a weight's gradient is formed from.
Operand = torch.Tensor | Product


def formed(operand: Operand) -> torch.Tensor:
    """The operand as a tensor."""
    return operand.form() if isinstance(operand, Product) else operand


def flat(operand: Operand) -> Operand:
    """The operand [..., n] as [tokens, n]."""
    if isinstance(operand, Product):
        return operand
    return operand.reshape(-1, operand.shape[-1])
