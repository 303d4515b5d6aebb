"""Compute group and instance norm between convolutions by means of pixels and of channels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind, calls, rank
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

# Besides what PyTorch marks as elementwise.
_KEEP_BLOCKS = (
    aten.hardswish.default,
    aten.prelu.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
    aten.cat.default,
    aten.constant_pad_nd.default,
    aten.index_select.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.upsample_bilinear2d.vec,
    aten.upsample_nearest2d.vec,
)


@dataclass(frozen=True)
class SplitGroupNorm(Pass):
    """Compute group and instance norm between convolutions by means of pixels and of channels.

    ::

        x ─ reshape(N, groups, …) ─ layer_norm   →   (x − mean) · 1/√(mean((mean − x)²) + eps)

        mean(y):  y ─ mean of pixels ─ reshape(N, groups, channels) ─ mean ─ expand ─ reshape

    Instance norm, a layer_norm over all pixels of a channel, needs no second mean. Other than the
    rows of a layer_norm, all of this works on channels in blocks, in as many tasks as there are
    blocks, and the last product joins what follows it. The mean is subtracted before squaring:
    E[x²] − E[x]² would cancel. Refused where no convolution is near that makes blocks.
    """

    name = "split_group_norm"
    # The same sums in another order.
    effect = APPROX(rtol=1e-5, atol=1e-5)
    after = ("fuse_layer_norm",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        rule = Rule("split group norm", (aten.layer_norm.default,), _grouped, _split, _check)
        apply_rules(graph, (rule,), notes)
        return notes.result()


@dataclass(frozen=True)
class Grouped:
    """A layer_norm of the groups of channels of the image `x`, `(N, C, …)`."""

    norm: fx.Node
    x: fx.Node
    groups: int


def _grouped(_gm: fx.GraphModule, norm: fx.Node) -> Grouped | None:
    a = bind(norm)
    rows = a["input"]
    sizes = g.shape(rows)
    if len(sizes) - len(a["normalized_shape"]) != 2:
        return None
    x = rows.args[0] if calls(rows, aten.reshape.default) else rows
    if rank(x) < 3 or g.shape(x)[0] != sizes[0] or g.shape(x)[1] % sizes[1]:
        x = rows
    return Grouped(norm, x, sizes[1]) if rank(x) >= 3 else None


def _check(_gm: fx.GraphModule, found: Grouped) -> Refusal | None:
    a = bind(found.norm)
    if a["weight"] is not None or a["bias"] is not None:
        return Refusal("its weight or bias varies inside a group")
    if g.value(found.norm).dtype != torch.float32:
        return Refusal(f"sums in {g.value(found.norm).dtype} would round differently")
    if math.prod(g.shape(found.x)[2:]) == 1:
        return Refusal("an image of one pixel lies in memory as the rows do")
    if not _from_convolution(found.x):
        return Refusal("it does not follow a convolution: rows of plain memory are faster")
    return None


def _from_convolution(x: fx.Node) -> bool:
    """Whether a convolution makes `x`, or what `x` is made of without moving channels."""
    seen = {x}
    for_later = [x]
    while for_later:
        node = for_later.pop()
        if calls(node, aten.convolution.default):
            return True
        if not (calls(node, *_KEEP_BLOCKS) or _is_elementwise(node)):
            continue
        fresh = [y for y in node.all_input_nodes if rank(y) == rank(x) and y not in seen]
        seen.update(fresh)
        for_later.extend(fresh)
    return False


def _is_elementwise(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and torch.Tag.pointwise in node.target.tags


def _split(ed: Editor, found: Grouped) -> fx.Node:
    x, groups = found.x, found.groups
    n, channels, *space = g.shape(x)
    image = [n, channels, *[1] * len(space)]

    def mean(value: fx.Node) -> fx.Node:
        means = ed.call(aten.mean.dim, value, list(range(2, rank(x))), True)
        if groups == channels:
            return means
        means = ed.call(aten.reshape.default, means, [n, groups, channels // groups])
        return ed.call(aten.mean.dim, means, [2], True)

    def to_image(value: fx.Node) -> fx.Node:
        if groups == channels:
            return value
        if groups == 1:
            return ed.call(aten.reshape.default, value, [n, 1, *image[2:]])
        spread = ed.call(aten.expand.default, value, [n, groups, channels // groups])
        return ed.call(aten.reshape.default, spread, image)

    eps: Any = bind(found.norm)["eps"]
    middle = to_image(mean(x))
    # The other way round than below: as one value it would have to be kept, for no gain.
    deviation = ed.call(aten.sub.Tensor, middle, x)
    variance = mean(ed.call(aten.mul.Tensor, deviation, deviation))
    scale = to_image(ed.call(aten.rsqrt.default, ed.call(aten.add.Tensor, variance, eps)))
    normal = ed.call(aten.mul.Tensor, ed.call(aten.sub.Tensor, x, middle), scale)
    if found.norm.args[0] is x:
        return normal
    return ed.call(aten.reshape.default, normal, list(g.shape(found.norm)))
