"""Reading arithmetic on one tensor: numbers, and expressions as polynomials of chosen nodes.

Written-out functions come with their constants multiplied out in many ways; as polynomials they
are all the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.graph import constant, value
from graphopt.passes._nodes import aten, calls, same_type
from graphopt.passes.rewrite import Refusal

ARITHMETIC = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
    aten.pow.Tensor_Scalar,
)

# Constants are written with few digits, or computed in float32.
CLOSE = 1e-6

# More than any written-out activation has; keeps the search for one cheap in long sums.
_MOST_NODES = 16
_HIGHEST_POWER = 4

Powers = tuple[int, ...]
Polynomial = dict[Powers, float]


@dataclass(frozen=True)
class Expanded:
    """A node as a polynomial of some atoms, and the nodes between it and them, it included.

    Attributes:
        terms: from the power of each atom to the coefficient, none of which is 0.
    """

    terms: Polynomial
    inner: tuple[fx.Node, ...]


def number(gm: fx.GraphModule, operand: object) -> float | None:
    """The operand as a number, if it is one or a constant of one element."""
    if isinstance(operand, int | float):
        return float(operand)
    tensor = constant(gm, operand)
    return float(tensor) if tensor is not None and tensor.numel() == 1 else None


def close(a: float, b: float, tolerance: float = CLOSE) -> bool:
    """Whether both are the same constant."""
    return math.isclose(a, b, rel_tol=tolerance)


def same(a: Polynomial, b: Polynomial, tolerance: float = CLOSE) -> bool:
    """Whether both have the same terms and close coefficients."""
    return a.keys() == b.keys() and all(close(a[key], b[key], tolerance) for key in a)


def nearby(node: fx.Node) -> list[fx.Node]:
    """The nodes that `node` is computed from by arithmetic, nearest first, itself included."""
    found = [node]
    for at in found:
        if calls(at, *ARITHMETIC):
            found.extend(source for source in at.all_input_nodes if source not in found)
        if len(found) > _MOST_NODES:
            break
    return found


def expand(gm: fx.GraphModule, root: fx.Node, atoms: Sequence[fx.Node]) -> Expanded | None:
    """The node as a polynomial of the atoms; None if it is none, or of another type than they."""
    inner: dict[fx.Node, Polynomial] = {}

    def visit(operand: object) -> Polynomial | None:
        if operand in atoms:
            return {tuple(int(operand is atom) for atom in atoms): 1.0}
        known = number(gm, operand)
        if known is not None:
            return {(0,) * len(atoms): known}
        if not isinstance(operand, fx.Node) or not calls(operand, *ARITHMETIC) or operand.kwargs:
            return None
        if operand not in inner:
            if len(inner) > _MOST_NODES or not same_type(value(operand), value(atoms[0])):
                return None
            inner[operand] = {}
            terms = combine(operand)
            if terms is None:
                return None
            inner[operand] = terms
        return inner[operand]

    def combine(node: fx.Node) -> Polynomial | None:
        left = visit(node.args[0])
        if left is None or calls(node, aten.neg.default):
            return None if left is None else _scaled(left, -1.0)
        if calls(node, aten.pow.Tensor_Scalar):
            power = node.args[1]
            if power not in range(1, _HIGHEST_POWER + 1):
                return None
            raised: Polynomial | None = left
            for _ in range(int(power) - 1):  # type: ignore[arg-type]
                raised = None if raised is None else _product(raised, left)
            return raised
        if calls(node, aten.div.Tensor):
            divisor = number(gm, node.args[1])
            return _scaled(left, 1 / divisor) if divisor else None
        right = visit(node.args[1])
        if right is None:
            return None
        if calls(node, aten.mul.Tensor):
            return _product(left, right)
        return _sum(left, _scaled(right, -1.0) if calls(node, aten.sub.Tensor) else right)

    terms = visit(root)
    return None if terms is None else Expanded(terms, tuple(inner))


def read_outside(root: fx.Node, inner: Sequence[fx.Node]) -> Refusal | None:
    """Why `root` cannot replace what it is computed by: a value in between has other readers."""
    inside = {root, *inner}
    for node in inner:
        others = [user.name for user in node.users if user not in inside]
        if others and node is not root:
            return Refusal(f"its intermediate value {node.name} is also read by {others[0]}")
    return None


def _scaled(terms: Polynomial, factor: float) -> Polynomial:
    return {powers: coefficient * factor for powers, coefficient in terms.items()}


def _sum(a: Polynomial, b: Polynomial) -> Polynomial:
    total: defaultdict[Powers, float] = defaultdict(float, a)
    for powers, coefficient in b.items():
        total[powers] += coefficient
    return {powers: coefficient for powers, coefficient in total.items() if coefficient}


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    total: defaultdict[Powers, float] = defaultdict(float)
    for p, x in a.items():
        for q, y in b.items():
            total[tuple(i + j for i, j in zip(p, q, strict=True))] += x * y
    if any(sum(powers) > _HIGHEST_POWER for powers in total):
        return None
    return {powers: coefficient for powers, coefficient in total.items() if coefficient}
