"""Take scales that are computed at run time out of the weights of a convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind, calls, is_float
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Rule, apply_rules


@dataclass(frozen=True)
class HoistWeightScales(Pass):
    """Take scales that are computed at run time out of the weights of a convolution.

    ::

        convolution(x, (w · s) · d)    →    convolution(x · s, w) · d

    `w` is a constant, `s` has a number for each input channel, and `d` one for each output channel:
    a convolution modulated by a style (Karras et al., "Analyzing and Improving the Image Quality of
    StyleGAN", 2020). With a style for each image of a batch, exporters make the images groups of
    one convolution; they become a batch again. Rounding differs.
    """

    name = "hoist_weight_scales"
    effect = APPROX(rtol=1e-4, atol=1e-5)
    after = ("canonicalize", "fold_constants")

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        rule = Rule("hoist weight scales", (aten.convolution.default,), _scaled, _hoist)
        apply_rules(graph, (rule,), notes)
        return notes.result()


@dataclass
class _Factors:
    """What a weight [images, outputs, inputs, *kernel] is the product of.

    Attributes:
        weight: the constant.
        of_inputs: scales with more than one element along the inputs.
        others: all other scales, with one for all inputs.
        numbers: Python numbers.
    """

    conv: fx.Node
    sizes: list[int]
    weight: fx.Node | None = None
    of_inputs: list[fx.Node] = field(default_factory=list)
    others: list[fx.Node] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Aligned to the weight's dimensions."""
        own = g.shape(node)
        return (1,) * (len(self.sizes) - len(own)) + own

    def take(self, value: Any) -> bool:
        """Split a value into factors; whether each of them can be hoisted."""
        if not isinstance(value, fx.Node):
            self.numbers.append(float(value))
            return True
        images, outputs, inputs, *kernel = self.shape(value)
        if max(kernel) > 1 or (outputs > 1 and inputs > 1):
            if calls(value, aten.mul.Tensor):
                return all(self.take(factor) for factor in value.args[:2])
            is_weight = value.op == "get_attr" and self.weight is None and images == 1
            self.weight = value if is_weight else None
            return is_weight
        (self.of_inputs if inputs > 1 else self.others).append(value)
        return True


def _scaled(_gm: fx.GraphModule, conv: fx.Node) -> _Factors | None:
    a = bind(conv)
    weight, groups = a["weight"], a["groups"]
    if weight.op == "get_attr" or a["transposed"] or not is_float(conv):
        return None
    rows, *rest = g.shape(weight)
    if groups > 1 and g.shape(a["input"])[0] != 1:
        return None
    if calls(weight, aten.reshape.default):
        weight = weight.args[0]
    sizes = [groups, rows // groups, *rest]
    own = list(g.shape(weight))
    if own != sizes[len(sizes) - len(own) :] or (groups > 1 and len(own) < len(sizes)):
        return None
    factors = _Factors(conv, sizes)
    fits = isinstance(weight, fx.Node) and factors.take(weight)
    found = fits and factors.weight is not None and (factors.of_inputs or factors.others)
    return factors if found else None


def _hoist(ed: Editor, factors: _Factors) -> fx.Node:
    conv = factors.conv
    a = bind(conv)
    images, outputs, inputs, *kernel = factors.sizes
    space = [1] * len(kernel)
    assert factors.weight is not None
    x = ed.call(aten.reshape.default, a["input"], _batch(a["input"], images, inputs))
    for scale in factors.of_inputs:
        own = factors.shape(scale)
        x = ed.call(aten.mul.Tensor, x, ed.call(
            aten.reshape.default, scale, [own[0], own[2], *space]))  # fmt: skip
    tensor = g.constant(ed.gm, factors.weight)
    assert tensor is not None
    tensor = tensor.reshape(factors.shape(factors.weight)[1:]).expand(outputs, inputs, *kernel)
    weight = ed.constant(factors.weight.name, tensor.contiguous())
    rest = [a[name] for name in ("stride", "padding", "dilation", "transposed", "output_padding")]
    out = ed.call(aten.convolution.default, x, weight, None, *rest, 1)
    for number in factors.numbers:
        out = ed.call(aten.mul.Tensor, out, number)
    for scale in factors.others:
        own = factors.shape(scale)
        out = ed.call(aten.mul.Tensor, out, ed.call(
            aten.reshape.default, scale, [own[0], own[1], *space]))  # fmt: skip
    if a["bias"] is not None:
        bias = ed.call(aten.reshape.default, a["bias"], [images, outputs, *space])
        out = ed.call(aten.add.Tensor, out, bias)
    return ed.call(aten.reshape.default, out, list(g.shape(conv)))


def _batch(x: fx.Node, images: int, channels: int) -> Sequence[int]:
    """The shape in which the groups of a convolution are a batch of images."""
    batch, _, *space = g.shape(x)
    return [batch * images, channels, *space]
