"""Remove ops that do nothing or undo each other, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.passes import _simplify_arithmetic, _simplify_shapes
from graphopt.passes.base import EXACT, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Rule, apply_rules

RULES: tuple[Rule[Any], ...] = (*_simplify_shapes.RULES, *_simplify_arithmetic.RULES)


@dataclass(frozen=True)
class Simplify(Pass):
    """Remove ops that do nothing or undo each other; the result stays the same to the last bit.

    ::

        permute ─ permute             →  permute, or nothing
        reshape ─ reshape             →  reshape
        slice ─ slice                 →  slice
        expand, pad, cast to its own  →  nothing
        cat of slices of one tensor   →  the tensor
        mul(x, 1), add(x, -0.0)       →  x
        mul(x, constant of one value) →  mul(x, number)
        pow(x, 2)                     →  mul(x, x)

    Exact means that `x + 0.0` stays (it turns -0.0 into 0.0), and so does `x * 0` (NaN).
    """

    name = "simplify"
    effect = EXACT
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rules until none fits."""
        notes = NoteBook()
        apply_rules(graph, RULES, notes)
        return notes.result()
