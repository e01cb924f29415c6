"""Tap: gives a linear layer's output a history in which the deltas get their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch.autograd.graph import get_gradient_edge

from spiel import ops, recompute
from spiel.ops.product import Operand


class Tapped(Protocol):
    """What backward asks of the layer; `spiel.layer.SpielLinear` is one."""

    @property
    def live_adapters(self) -> tuple[str, ...]: ...

    def make_live(self, adapters: Sequence[str]) -> None: ...

    def delta_gradient(self, adapter: str, x: Operand, grad_out: torch.Tensor) -> torch.Tensor: ...


class Observer(Protocol):
    """Who watches a weight's gradient; `spiel.window.GradientWindow` is one."""

    def observe(
        self, left_TR: torch.Tensor, right_TC: Operand, indices: torch.Tensor
    ) -> torch.Tensor:
        """Called in backward. The weight's gradient is left.T @ right; returns its entries [k] at
        `indices` in fp32, which may come along with those that the observer wants for itself.
        """
        ...


class Tap(torch.autograd.Function):
    """Lets the base layer's output pass, and forms the gradients of the deltas going backward."""

    @staticmethod
    def forward(
        ctx: Any,
        out: torch.Tensor,
        x: torch.Tensor,
        layer: Tapped,
        adapters: tuple[str, ...],
        *deltas: torch.Tensor,
    ) -> torch.Tensor:
        ctx.layer, ctx.adapters, ctx.deltas = layer, adapters, deltas
        ctx.is_kept = any(ctx.needs_input_grad[4:]) and not recompute.can_remake(x)
        if ctx.is_kept:
            ctx.save_for_backward(x)
        # The same memory with a history of its own. Returned as it is, `out` would be a view, which
        # nobody could change in place; marked as changed, it would be lost to who else kept it.
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _backward(ctx, grad_out)
        with torch.no_grad():  # but the graph is wanted (create_graph=True)
            _, *others = _backward(ctx, grad_out)
        passed = _Passed.apply(grad_out, *ctx.deltas)
        known = (None if each is None else _Final.apply(each, passed) for each in others)
        return passed, *known


NO_SECOND_DERIVATIVE = (
    "SpIEL's gradients have no second derivative by the deltas: freeze the adapter "
    "(requires_grad_(False)) or merge it (merge_adapter) where only inputs' derivatives are wanted"
)


class _Passed(torch.autograd.Function):
    """The gradient of a tapped output, as the base layer goes on with it by the weight. Its history
    is exact but for what the weight owes to the deltas: whoever asks for that is told.
    """

    @staticmethod
    def forward(ctx: Any, grad_out: torch.Tensor, *deltas: torch.Tensor) -> torch.Tensor:
        return grad_out.detach()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        nodes = [node for node, _ in ctx.next_functions[1:]]
        if any(node is not None and _will_run(node) for node in nodes):
            raise RuntimeError(NO_SECOND_DERIVATIVE)
        return grad, *(None for _ in nodes)


class _Final(torch.autograd.Function):
    """A gradient of deltas, which depends on `source`, as nobody may ask how."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        return gradient.detach()

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> tuple[None, ...]:
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """`Tap.backward`, under no_grad."""
    _forget_at_the_end()
    # The base layer's backward comes next and reads the weight, which since the forward pass
    # may have been given to other adapters or been put back.
    if ctx.layer.live_adapters != ctx.adapters:
        ctx.layer.make_live(ctx.adapters)
    # The nodes of `x` and of the deltas; None where no gradient is needed.
    source, *nodes = [node for node, _ in ctx.next_functions[1:]]
    are_wanted = [node is not None and _will_run(node) for node in nodes]
    if not any(are_wanted):
        return grad_out, None, None, None, *(None for _ in nodes)
    x = ctx.saved_tensors[0] if ctx.is_kept else recompute.remade(source)
    gradients = [
        ctx.layer.delta_gradient(adapter, x, grad_out) if is_wanted else None
        for adapter, is_wanted in zip(ctx.adapters, are_wanted, strict=True)
    ]
    return grad_out, None, None, None, *gradients


_backward_pass = -1


def _forget_at_the_end() -> None:
    """Has `forget` called once for each backward pass."""
    global _backward_pass
    under_way = torch._C._current_graph_task_id()
    if under_way != _backward_pass:
        _backward_pass = under_way
        torch.autograd.Variable._execution_engine.queue_callback(forget)


def forget() -> None:
    """Lets go of what is kept from one layer's backward for the next one's."""
    ops.forget()
    recompute.forget()


def is_wanted(parameter: torch.Tensor) -> bool:
    """Whether the backward pass under way gives `parameter` a gradient."""
    return parameter.requires_grad and _will_run(get_gradient_edge(parameter).node)


def _will_run(node: Any) -> bool:
    """Whether the backward pass under way goes on to `node`."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad names it as what it wants, or this is no backward
        return True
