"""What operator handlers work with: values, the node they read, and the graph they write to.

A value is a torch tensor while it is known at import time and an fx node once it depends on the
model's inputs. `Context.op` keeps it so: with constant operands it computes on the spot, otherwise
it inserts a node. Chains that only compute shapes vanish this way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import fx

from graphopt import graph as G

Value: TypeAlias = torch.Tensor | fx.Node

# Constants are not blown up at import: 16 M elements, 64 MB of float32.
LARGEST_EVALUATION = 1 << 24


class Refused(Exception):
    """This node cannot be imported; the text says why."""


@dataclass(frozen=True)
class OnnxNode:
    """One ONNX node with its operands resolved.

    Attributes:
        op: the operator's name.
        operands: values; None where an optional input is left out.
        attributes: as onnx-graphsurgeon gives them.
        used: for each output, whether anything reads it.
        origin: how errors and reports name the node.
    """

    op: str
    operands: tuple[Value | None, ...]
    attributes: dict[str, Any]
    used: tuple[bool, ...]
    origin: str

    def has(self, position: int) -> bool:
        """Whether the optional input is there."""
        return position < len(self.operands) and self.operands[position] is not None

    def value(self, position: int) -> Value:
        """A required input."""
        found = self.optional(position)
        if found is None:
            raise Refused(f"input {position} is missing")
        return found

    def optional(self, position: int) -> Value | None:
        """An input or None."""
        return self.operands[position] if position < len(self.operands) else None

    def get_int(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self.attributes.get(name, default))

    def get_float(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self.attributes.get(name, default))

    def get_str(self, name: str, default: str) -> str:
        """A string attribute."""
        return str(self.attributes.get(name, default))

    def get_ints(self, name: str, default: Sequence[int] | None = None) -> list[int] | None:
        """A list attribute, or `default` when the node does not have it."""
        found = self.attributes.get(name, default)
        return None if found is None else [int(v) for v in found]

    def only_first_output(self) -> None:
        """Refuse nodes of which a second output is read."""
        if any(self.used[1:]):
            raise Refused("only its first output can be used")


@dataclass
class Context:
    """The graph being built.

    Attributes:
        opset: the model's version of the default operator set.
    """

    gm: fx.GraphModule
    opset: int
    origin: G.Origin = ()
    # id → (tensor, name): the tensor is kept so that its id stays its own.
    names: dict[int, tuple[torch.Tensor, str]] = field(default_factory=dict)
    stored: dict[int, fx.Node] = field(default_factory=dict)

    def op(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Value:
        """`target(*args, **kwargs)`: computed now if every operand is constant, else a new node."""
        if not _contains_node((args, kwargs)) and self._small(target, args, kwargs):
            with torch.no_grad():
                result: torch.Tensor = target(*args, **kwargs)
            return result.contiguous()
        node_args = self._with_nodes(args)
        node_kwargs = self._with_nodes(kwargs)
        return G.call(self.gm.graph, target, node_args, node_kwargs, origin=self.origin)

    def node(self, value: Value) -> fx.Node:
        """The value as a node; constants are stored in the module once."""
        if isinstance(value, fx.Node):
            return value
        known = self.stored.get(id(value))
        if known is None:
            _, name = self.names.get(id(value), (value, "constant"))
            known = G.add_constant(self.gm, name, value.contiguous(), origin=self.origin)
            self.stored[id(value)] = known
            self.names[id(value)] = (value, name)
        return known

    def name(self, tensor: torch.Tensor, name: str) -> None:
        """Remember what the ONNX file calls a constant."""
        self.names[id(tensor)] = (tensor, name)

    def _small(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        on_meta = torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.to("meta"), (args, kwargs)
        )
        try:
            size = int(target(*on_meta[0], **on_meta[1]).numel())
        except NotImplementedError:  # no shape rule, or the shape depends on values
            return True
        return size <= LARGEST_EVALUATION

    def _with_nodes(self, structure: Any) -> Any:
        return torch.utils._pytree.tree_map_only(torch.Tensor, self.node, structure)


def shape(value: Value) -> tuple[int, ...]:
    """The value's static shape."""
    return G.shape(value) if isinstance(value, fx.Node) else tuple(value.shape)


def rank(value: Value) -> int:
    """The number of dimensions."""
    return len(shape(value))


def dtype(value: Value) -> torch.dtype:
    """The value's element type."""
    return G.value(value).dtype if isinstance(value, fx.Node) else value.dtype


def elements(value: Value) -> int:
    """The number of elements."""
    return math.prod(shape(value))


def axis_of(axis: int, dimensions: int) -> int:
    """A possibly negative axis counted from the front."""
    if not -dimensions <= axis < max(dimensions, 1):
        raise Refused(f"axis {axis} is outside a tensor of {dimensions} dimensions")
    return axis + dimensions if axis < 0 else axis


def integers(value: Value, what: str) -> list[int]:
    """The elements of a constant that says a shape, axes and the like."""
    if isinstance(value, fx.Node):
        raise Refused(f"its {what} are computed from the model's inputs; they must be constant")
    return [int(v) for v in value.reshape(-1).tolist()]


def number(value: Value, what: str) -> float | int | bool:
    """The one element of a constant."""
    if isinstance(value, fx.Node):
        raise Refused(f"its {what} is computed from the model's inputs; it must be constant")
    found: float | int | bool = value.reshape(()).item()
    return found


def scalar(value: Value) -> float | int | None:
    """The number a one-element numeric constant holds; None for any other value."""
    if isinstance(value, fx.Node) or value.numel() != 1 or value.dtype == torch.bool:
        return None
    if value.dtype.is_complex:
        return None
    found: float | int = value.reshape(()).item()
    return found


def _contains_node(structure: Any) -> bool:
    return any(isinstance(leaf, fx.Node) for leaf in torch.utils._pytree.tree_leaves(structure))
