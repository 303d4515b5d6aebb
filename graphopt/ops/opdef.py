"""What graphopt knows about one operator, and how code reads a node that calls it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt import graph as G

Expr = Any
"""A TIR expression."""
Index = tuple[Any, ...]
"""One logical index per dimension (Python ints or TIR expressions)."""
Reader = Callable[[Index], Expr]
"""Gives an operand's element at a logical index."""


class Kind(enum.Enum):
    """How an operator fuses.

    ELEMENTWISE: one output element from one element of each operand, with broadcasting. Fuses into
        the kernel that makes its operand (epilogue) or into the one that reads it (prologue).
    INJECTIVE: one output element from single operand elements at computed places (permute, slice,
        pad, concat, gather). Fuses with elementwise operators around it.
    VIEW: the same bytes under another shape; free where the layout allows it.
    REDUCTION: one output element folded from many (pooling, means); takes an epilogue.
    ANCHOR: has kernel generators of its own (convolution, matmul, softmax …); takes an epilogue.
    """

    ELEMENTWISE = enum.auto()
    INJECTIVE = enum.auto()
    VIEW = enum.auto()
    REDUCTION = enum.auto()
    ANCHOR = enum.auto()


@dataclass(frozen=True)
class Reduction:
    """A fold over a box of operand elements.

    Attributes:
        extents: the box.
        element: output index, box index → element; must be valid at every box index.
        combine: `sum` or `max` or `min` or `prod`.
        finish: folded value, output index → output element.
        axes: where the box simply runs along axes of the one operand, those axes; else None. Lets
            the schedule run vectors along a contiguous reduced axis.
    """

    extents: tuple[int, ...]
    element: Callable[[Index, Index], Expr]
    combine: str
    finish: Callable[[Expr, Index], Expr]
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One call for the contract tests.

    Attributes:
        args: the positional arguments; tensors become model inputs.
        kwargs: the keyword arguments.
        ulp: largest error in units in the last place: of the element itself where each comes from
            one element of the operands, of the largest element where elements are added up.
        constants: positions of the tensors that the model holds as constants.
    """

    args: Callable[[torch.Generator], tuple[Any, ...]]
    kwargs: dict[str, Any] = field(default_factory=dict)
    ulp: float = 4.0
    constants: tuple[int, ...] = ()


_HEAVY = frozenset({
    "sigmoid", "tanh", "exp", "log", "log1p", "expm1", "erf", "gelu", "silu", "mish", "elu", "celu",
    "selu", "softplus", "sin", "cos", "pow", "softmax", "log_softmax", "exp2", "log2", "log10",
    "erfc", "tan", "asin", "acos", "atan", "atan2", "sinh", "cosh", "asinh", "acosh", "atanh",
})  # fmt: skip


@dataclass(frozen=True)
class OpDef:
    """One operator: everything the compiler needs to know of it, in one place.

    Attributes:
        name: as reports name it.
        targets: the ATen overloads it covers.
        kind: how it fuses; says which form `compute` has.
        compute: ELEMENTWISE `(call, *values) -> Expr`, one value per operand of the schema's
            tensor (or number) arguments named in `operands`; INJECTIVE `(call, *readers, index) ->
            Expr`; REDUCTION `(call, *readers) -> Reduction`; None for ANCHOR and VIEW.
        operands: schema arguments that are tensors (a list argument gives one operand each).
        promote: whether elementwise operands are first cast to their common dtype.
        check: reason the call cannot be compiled, or None.
        samples: what the contract tests run.
    """

    name: str
    targets: tuple[Any, ...]
    kind: Kind
    compute: Callable[..., Any] | None = None
    operands: tuple[str, ...] = ("self",)
    promote: bool = True
    check: Callable[[Call], str | None] | None = None
    samples: Sequence[Sample] = ()

    @property
    def heavy(self) -> bool:
        """Whether it evaluates a transcendental function: tens of instructions an element."""
        return self.name in _HEAVY


class Call:
    """A node's arguments by schema name, defaults filled in."""

    def __init__(self, node: fx.Node) -> None:
        """Read a node that calls an ATen overload."""
        self.node = node
        self.arguments: dict[str, Any] = {}
        schema = node.target._schema  # type: ignore[union-attr]
        for position, argument in enumerate(schema.arguments):
            if position < len(node.args) and not argument.kwarg_only:
                self.arguments[argument.name] = node.args[position]
            elif argument.name in node.kwargs:
                self.arguments[argument.name] = node.kwargs[argument.name]
            else:
                self.arguments[argument.name] = argument.default_value

    def __getitem__(self, name: str) -> Any:
        """The argument of this name: a node, a number, a list …"""
        return self.arguments[name]

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape."""
        return G.shape(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """The output's dtype."""
        return G.value(self.node).dtype

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor argument."""
        return G.shape(self.arguments[name])

    def operands(self, names: Sequence[str]) -> list[Any]:
        """The values of these arguments in order, list arguments spread.

        None is left out, and so is an argument this overload does not have.
        """
        values: list[Any] = []
        for name in names:
            value = self.arguments.get(name)
            if isinstance(value, (list, tuple)):
                values.extend(value)
            elif value is not None:
                values.append(value)
        return values


def normalize_axes(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes as sorted non-negative numbers; None or an empty list means all of them.

    A scalar takes axis 0 and has none.
    """
    if rank == 0 or axes is None or (isinstance(axes, (list, tuple)) and not axes):
        return tuple(range(rank))
    if isinstance(axes, int):
        axes = (axes,)
    return tuple(sorted(int(axis) % rank for axis in axes))


def broadcast_index(index: Index, shape: Sequence[int]) -> Index:
    """The index into an operand of `shape` that broadcasting reads for output `index`."""
    tail = index[len(index) - len(shape) :]
    return tuple(0 if extent == 1 else place for place, extent in zip(tail, shape, strict=True))
