"""Reading nodes: arguments by name, hashable arguments, single uses, result types."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.graph import shape, value

aten = torch.ops.aten


@functools.cache
def parameters(target: OpOverload) -> tuple[tuple[str, bool, bool, Any], ...]:
    """For each parameter of the op: name, keyword-only, has a default, the default."""
    return tuple(
        (
            p.name,
            p.kwarg_only,
            p.has_default_value(),
            p.default_value if p.has_default_value() else None,
        )
        for p in target._schema.arguments
    )


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of an op node by parameter name, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    bound: dict[str, Any] = {}
    for position, (name, keyword_only, _, default) in enumerate(parameters(node.target)):
        if not keyword_only and position < len(node.args):
            bound[name] = node.args[position]
        else:
            bound[name] = node.kwargs.get(name, default)
    return bound


def calls(node: object, *targets: Callable[..., Any]) -> bool:
    """Whether `node` is a call of one of the targets."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads `node`, or None if several or none do."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def other_readers(node: fx.Node, user: fx.Node) -> str:
    """Names of the nodes besides `user` that read `node`, for messages."""
    names = [reader.name for reader in node.users if reader is not user]
    return ", ".join(names[:3]) + (" and more" if len(names) > 3 else "")


def results(node: fx.Node) -> tuple[torch.Tensor, ...]:
    """The node's results as meta tensors: one for most ops, several before canonicalization."""
    val = node.meta["val"]
    return tuple(val) if isinstance(val, tuple | list) else (val,)


def gives_several(node: fx.Node) -> bool:
    """Whether the node's result is a tuple of tensors (legal only under `operator.getitem`)."""
    return isinstance(node.meta.get("val"), tuple | list)


def item(node: fx.Node, index: int) -> list[fx.Node]:
    """The `getitem` nodes that read result `index` of a node with several results."""
    return [u for u in node.users if calls(u, operator.getitem) and u.args[1] == index]


def same_type(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both have the same shape and dtype."""
    return a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)


def is_random(target: object) -> bool:
    """Whether two calls of the op with the same arguments may differ."""
    if not isinstance(target, OpOverload):
        return False
    empties = ("aten::empty", "aten::new_empty")  # uninitialized memory
    return torch.Tag.nondeterministic_seeded in target.tags or target._schema.name.startswith(
        empties
    )


def freeze(argument: Any, of_node: Callable[[fx.Node], Any]) -> Any:
    """A hashable form of an argument; 1, 1.0 and True, or 0.0 and -0.0, stay different."""
    if isinstance(argument, fx.Node):
        return of_node(argument)
    if isinstance(argument, list | tuple):
        return tuple([freeze(entry, of_node) for entry in argument])
    if isinstance(argument, dict):
        return tuple((key, freeze(argument[key], of_node)) for key in sorted(argument))
    if isinstance(argument, bool | int | float | complex):
        return (type(argument), repr(argument))
    if isinstance(argument, slice):
        return (slice, freeze((argument.start, argument.stop, argument.step), of_node))
    return argument


def rank(node: fx.Node) -> int:
    """The number of dimensions of the node's result."""
    return len(shape(node))


def is_float(node: fx.Node) -> bool:
    """Whether the node's result has a floating-point dtype."""
    return value(node).dtype.is_floating_point
