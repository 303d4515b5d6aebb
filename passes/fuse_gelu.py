"""Recognize GELU where it is written out with erf or tanh."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from graphopt.graph import value
from graphopt.passes._formula import Polynomial, expand, nearby, read_outside, same
from graphopt.passes._nodes import aten, calls, is_float, same_type
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

_GATES = (aten.erf.default, aten.tanh.default)

# The result in powers of x and of erf or tanh: ½x + ½x·gate.
_WHOLE: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}

# What the gate is taken of, in powers of x (Hendrycks and Gimpel, "Gaussian Error Linear Units").
_SLOPE = math.sqrt(2 / math.pi)
_INSIDE: dict[object, Polynomial] = {
    aten.erf.default: {(1,): math.sqrt(0.5)},
    aten.tanh.default: {(1,): _SLOPE, (3,): 0.044715 * _SLOPE},
}

# A formula with constants this near is meant to be GELU; nearer than a float32 rounding it is GELU.
_MEANT = 1e-2


@dataclass(frozen=True)
class Found:
    """GELU of `x` and its root node.

    Attributes:
        inner: the erf or tanh, and what is computed from it.
        exact: the constants are right.
    """

    x: fx.Node
    gate: fx.Node
    root: fx.Node
    inner: tuple[fx.Node, ...]
    exact: bool


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Recognize GELU written out with erf, or with tanh.

    ::

        x ─┬─ div(√2) ─ erf ─ add(1) ─┐
           └─ mul(0.5) ───────────── mul ─   →   x ─ gelu ─

        ½ · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³)))   →   gelu(x, approximate="tanh")

    however the sums and products are ordered and the constants are multiplied out. Refused where
    erf or tanh would have to stay for other readers, and where the constants are near GELU's but
    not its own.
    """

    name = "fuse_gelu"
    # The formulas differ from PyTorch's own kernels by a few roundings of values near 1.
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        roots = (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor)
        apply_rules(graph, (Rule("fuse gelu", roots, _gelu, _fused, _check),), notes)
        return notes.result()


def _gelu(gm: fx.GraphModule, root: fx.Node) -> Found | None:
    if not is_float(root):
        return None
    for gate in nearby(root):
        if not calls(gate, *_GATES):
            continue
        inside = gate.args[0]
        assert isinstance(inside, fx.Node)
        for x in nearby(inside)[1:]:
            found = _gelu_of(gm, x, inside, gate, root)
            if found is not None:
                return found
    return None


def _gelu_of(
    gm: fx.GraphModule, x: fx.Node, inside: fx.Node, gate: fx.Node, root: fx.Node
) -> Found | None:
    if not same_type(value(x), value(root)):
        return None
    argument = expand(gm, inside, [x])
    wanted = _INSIDE[gate.target]
    if argument is None or not same(argument.terms, wanted, _MEANT):
        return None
    whole = expand(gm, root, [x, gate])
    if whole is None or not same(whole.terms, _WHOLE, _MEANT):
        return None
    exact = same(argument.terms, wanted) and same(whole.terms, _WHOLE)
    return Found(x, gate, root, _computed_from(gate, whole.inner), exact)


def _computed_from(gate: fx.Node, nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """The gate and those of the nodes that depend on it.

    Others may be read elsewhere: ½x stays for its other readers, which costs next to nothing,
    while a second erf would.
    """
    found = [gate]
    for node in found:
        found.extend(user for user in node.users if user in nodes and user not in found)
    return tuple(found)


def _check(_gm: fx.GraphModule, found: Found) -> Refusal | None:
    if not found.exact:
        name = "erf" if calls(found.gate, aten.erf.default) else "tanh"
        return Refusal(f"the constants around {name} are near those of GELU, but not the same")
    return read_outside(found.root, found.inner)


def _fused(ed: Editor, found: Found) -> fx.Node:
    if calls(found.gate, aten.tanh.default):
        return ed.call(aten.gelu.default, found.x, approximate="tanh")
    return ed.call(aten.gelu.default, found.x)
