"""What the op families of the pass `canonicalize` share: the handler's type and small helpers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx

from graphopt.graph import shape
from graphopt.passes._nodes import aten, item
from graphopt.passes.rewrite import Editor, Refusal

# What a handler makes of a node: its replacement; for a node with several results the replacement
# of each (None where it has none); why it cannot be replaced; None if it is canonical already.
Outcome: TypeAlias = fx.Node | list[fx.Node | None] | Refusal | None

# Called with the node's arguments by parameter name, defaults filled in.
Handler: TypeAlias = Callable[[Editor, fx.Node, dict[str, Any]], Outcome]


def used(node: fx.Node, index: int) -> bool:
    """Whether something reads result `index` of a node with several results."""
    return any(getitem.users for getitem in item(node, index))


def filled(numbers: int | list[int] | tuple[int, ...], dims: int) -> list[int]:
    """One number for each dimension: ATen allows one number for all."""
    listed = [numbers] if isinstance(numbers, int) else list(numbers)
    return listed * dims if len(listed) == 1 else listed


def per_channel(ed: Editor, vector: fx.Node, dims: int) -> fx.Node:
    """A vector over channels (dimension 1 of `dims`) in a shape that broadcasts: (C, 1, …)."""
    return ed.call(aten.reshape.default, vector, [shape(vector)[0], *[1] * (dims - 2)])
