"""A layer's input made again going backward, from what autograd keeps for the model's own sake.

The gradient of the deltas needs the layer's input, which a frozen layer need not keep. Where that
input is a product of activations (a gated MLP, a normalisation) or their GELU, the graph holds its
factors until the backward pass is past them: so the input need not be kept beside them, and one
pass over the factors gives it again, bit for bit. A kernel that multiplies them as it reads them
spares even that pass: so products are handed on as such.
"""

from __future__ import annotations

import operator
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from spiel.ops.product import Operand, Product

#: A node of autograd's graph: the operation that made a tensor. None for a tensor without one.
Node = Any

#: Products, copies in another dtype or on another device, and GELU: what nodes `_factors` knows.
PRODUCT, COPY, GELU = "MulBackward0", "ToCopyBackward0", "GeluBackward0"


def can_remake(x: torch.Tensor) -> bool:
    """Whether `remade` can make `x` from the node `x.grad_fn`; else it must be kept.

    Not from what hooks have taken (activation checkpointing, offloading): they may give each tensor
    back only once. Hooks whose `unpack_hook` has a true attribute `changes_nothing` only look on.
    """
    return type(x) is torch.Tensor and x._version == 0 and _is_known(x.grad_fn)


def _is_known(node: Node) -> bool:
    """Whether `node` is one that `_factors` knows, and so is whatever it did not keep itself."""
    if node is None:
        return False
    name = node.name()
    if name == PRODUCT:
        (left, _), (right, _) = node.next_functions
        # A factor is kept for the gradient of the other one, if that has one.
        return (_is_free(node._raw_saved_self) if right else _is_known(left)) and (
            _is_free(node._raw_saved_other) if left else _is_known(right)
        )
    if name == COPY:
        return _is_known(node.next_functions[0][0])
    return name == GELU and _is_free(node._raw_saved_self)


def _is_free(saved: Any) -> bool:
    """Whether a saved tensor may be read at any time: there are no hooks to give it back."""
    hook = getattr(saved, "unpack_hook", _unknown)
    return hook is None or getattr(hook, "changes_nothing", False)


def _unknown() -> None:
    """Stands for the hooks of a torch that does not tell whether there are any."""


#: The node asked for last and what it made: modules that share an input ask one after the other.
#: One object, so that threads (a backward pass has one for each GPU) never see half a change.
_last: tuple[Node, Operand] | None = None


def remade(node: Node) -> Operand:
    """The tensor [..., n] that `node` made, if it `can_remake` that; in a backward pass not yet
    past `node`. If it is a product of what the graph keeps, that [tokens, n], not formed yet.

    Raises:
        RuntimeError: an earlier backward pass freed the graph there, or a factor was changed.
    """
    global _last
    last = _last
    if last is not None and last[0] is node:
        return last[1]
    last = _last = None  # before the next is made, not beside it
    with torch.no_grad():
        factors = _factors(node)
        x = Product.of(factors) or _multiplied(factors)
    _last = node, x
    return x


def forget() -> None:
    """Lets go of the tensor kept for the next layer; for the end of a backward pass."""
    global _last
    _last = None


def _factors(node: Node) -> list[torch.Tensor]:
    """What `node` made, as factors to be multiplied from the left, the largest first."""
    if node.name() != PRODUCT:
        return [_remake(node)]
    saved = node._saved_self, node._saved_other
    sides = [
        _factors(made_by) if kept is None else [kept.detach()]
        for kept, (made_by, _) in zip(saved, node.next_functions, strict=True)
    ]
    first, second = sorted(sides, key=lambda side: (len(side), side[0].numel()), reverse=True)
    return [*first, _multiplied(second)]


def _multiplied(factors: list[torch.Tensor]) -> torch.Tensor:
    return reduce(operator.mul, factors)


def _remake(node: Node) -> torch.Tensor:
    """What `node`, a copy or a GELU, made."""
    if node.name() == GELU:
        return F.gelu(node._saved_self, approximate=node._saved_approximate)
    out = node._input_metadata[0]  # what goes in backward came out forward
    return _multiplied(_factors(node.next_functions[0][0])).to(out.device, out.dtype)
