"""Fold zero padding into the convolution that reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import graph as g
from graphopt.passes._affine import readers_problem
from graphopt.passes._nodes import aten, bind, calls
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules


@dataclass(frozen=True)
class FoldPad(Pass):
    """Fold zero padding into the convolution that reads it.

    ::

        constant_pad_nd(1, 1, 1, 1) ─ convolution(padding 0)   →   convolution(padding 1)

    Refused where the padding is not the same on both sides, not zero, not of space, negative, or
    read by others, and before transposed convolutions, whose padding crops. Sums may be taken in
    another order.
    """

    name = "fold_pad"
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        rule = Rule(
            "fold pad into convolution", (aten.convolution.default,), _padded, _fold, _check
        )
        apply_rules(graph, (rule,), notes)
        return notes.result()


def _padded(_gm: fx.GraphModule, conv: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    pad = bind(conv)["input"]
    return (pad, conv) if calls(pad, aten.constant_pad_nd.default) else None


def _check(_gm: fx.GraphModule, match: tuple[fx.Node, fx.Node]) -> Refusal | None:
    pad, conv = match
    a = bind(pad)
    space = len(g.shape(conv)) - 2
    before, after = a["pad"][0::2], a["pad"][1::2]
    if bind(conv)["transposed"]:
        return Refusal("the padding of a transposed convolution crops its result")
    if a["value"] != 0:
        return Refusal(f"it pads with {a['value']}, a convolution with 0")
    if min(*a["pad"], 0) < 0:
        return Refusal("negative padding crops")
    if any(before[space:]) or any(after[space:]):
        return Refusal("it pads channels or the batch")
    if before != after:
        return Refusal(f"it is not the same on both sides: {list(a['pad'])}")
    return readers_problem(pad, conv)


def _fold(ed: Editor, match: tuple[fx.Node, fx.Node]) -> fx.Node:
    pad, conv = match
    a = bind(conv)
    padding: list[int] = list(a["padding"])
    # constant_pad_nd lists the last dimension first.
    for axis, amount in enumerate(bind(pad)["pad"][0 : 2 * len(padding) : 2]):
        padding[-1 - axis] += amount
    arguments: dict[str, Any] = {**a, "input": pad.args[0], "padding": padding}
    origin = g.merge_origins((pad, conv))
    return ed.call(aten.convolution.default, *arguments.values(), origin=origin)
