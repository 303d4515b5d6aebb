"""Make matrix products of layers whose weights are computed at run time."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

from torch import fx

from graphopt import graph as g
from graphopt.passes._canonical import per_channel
from graphopt.passes._nodes import aten, bind, rank
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules


@dataclass(frozen=True)
class MultiplyComputedWeights(Pass):
    """Make matrix products of layers whose weights are computed at run time.

    ::

        convolution(x, w, b)    →    matmul(w, x's windows) ─ add(·, b)
        linear(x, w, b)         →    matmul(x, permute(w)) ─ add(·, b)

    Kernels of layers pack their weights when the model is compiled. Here there are none to pack: a
    hypernetwork makes them, or modulation by a style. A bias that is computed becomes an addition.
    Refused for transposed convolutions. Sums may be taken in another order.
    """

    name = "multiply_computed_weights"
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize", "fold_constants")

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rules until they fit nowhere."""
        notes = NoteBook()
        rules = (
            Rule("multiply computed weights of a convolution", (aten.convolution.default,),
                 _computed, _convolution, _check),
            Rule("multiply computed weights of a linear layer", (aten.linear.default,),
                 _computed, _linear),
        )  # fmt: skip
        apply_rules(graph, rules, notes)
        return notes.result()


def _is_computed(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr"


def _computed(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    a = bind(node)
    return node if _is_computed(a["weight"]) or _is_computed(a["bias"]) else None


def _check(_gm: fx.GraphModule, conv: fx.Node) -> Refusal | None:
    a = bind(conv)
    if a["transposed"] and _is_computed(a["weight"]):
        return Refusal("it is transposed")
    return None


def _linear(ed: Editor, node: fx.Node) -> fx.Node:
    a = bind(node)
    if _is_computed(a["weight"]):
        turned = ed.call(aten.permute.default, a["weight"], [1, 0])
        out = ed.call(aten.matmul.default, a["input"], turned)
    else:
        out = ed.call(aten.linear.default, a["input"], a["weight"], None)
    return out if a["bias"] is None else ed.call(aten.add.Tensor, out, a["bias"])


def _convolution(ed: Editor, node: fx.Node) -> fx.Node:
    a = bind(node)
    if _is_computed(a["weight"]):
        out = ed.call(aten.reshape.default, _product(ed, node, a), list(g.shape(node)))
    else:
        out = ed.call(aten.convolution.default, *{**a, "bias": None}.values())
    if a["bias"] is None:
        return out
    return ed.call(aten.add.Tensor, out, per_channel(ed, a["bias"], rank(node)))


def _product(ed: Editor, node: fx.Node, a: dict[str, Any]) -> fx.Node:
    """The output [N, groups, channels of one, pixels]."""
    batch, channels, *out = g.shape(node)
    groups, kernel = a["groups"], g.shape(a["weight"])[2:]
    inputs = g.shape(a["weight"])[1]
    parts = [
        ed.call(aten.reshape.default, window, [batch, groups, inputs, prod(out)])
        for window in _windows(ed, a, kernel, out)
    ]
    columns = parts[0] if len(parts) == 1 else ed.call(aten.cat.default, parts, 2)
    # The windows' places are outside the channels: parts of a cat then lie as they are computed.
    apart = [groups, channels // groups, inputs, prod(kernel)]
    weight = ed.call(aten.reshape.default, a["weight"], apart)
    weight = ed.call(aten.permute.default, weight, [0, 1, 3, 2])
    rows = ed.call(aten.reshape.default, weight, [*apart[:2], inputs * prod(kernel)])
    return ed.call(aten.matmul.default, rows, columns)


def _windows(
    ed: Editor, a: dict[str, Any], kernel: tuple[int, ...], out: list[int]
) -> list[fx.Node]:
    """For each place of the kernel, the input pixels that it meets."""
    x = a["input"]
    if any(a["padding"]):
        both = [n for pad in reversed(a["padding"]) for n in (pad, pad)]
        x = ed.call(aten.constant_pad_nd.default, x, both, 0.0)
    found = []
    for places in product(*(range(size) for size in kernel)):
        window = x
        for axis, place in enumerate(places):
            start, step = place * a["dilation"][axis], a["stride"][axis]
            end = start + (out[axis] - 1) * step + 1
            if (start, end, step) != (0, g.shape(x)[axis + 2], 1):
                window = ed.call(aten.slice.Tensor, window, axis + 2, start, end, step)
        found.append(window)
    return found
