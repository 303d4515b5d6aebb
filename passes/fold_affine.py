"""Fold multiplications and additions with constants into neighbouring layers or one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes import _affine
from graphopt.passes._affine import Affine, Layer
from graphopt.passes._nodes import aten, bind, calls, is_float, only_user, rank, same_type
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

_STEPS = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.neg.default,
)


@dataclass(frozen=True)
class Step:
    """An elementwise node `x * scale + shift`; the constants broadcast to `x`, in float64."""

    node: fx.Node
    x: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class FoldAffine(Pass):
    """Fold mul, add, sub and div with constants into neighbouring weights, or chains into one.

    ::

        convolution(x, w, b) ─ mul(c)        →   convolution(x, w·c, b·c)
        sub(mean) ─ div(std) ─ linear        →   linear
        mul(c) ─ pad ─ convolution           →   pad ─ convolution
        mul(a) ─ add(b) ─ mul(c)             →   mul(a·c) ─ add(b·c)
        matmul(x, w) ─ add(b)                →   linear(x, wᵀ, b)

    Constants are numbers, or tensors with one value for each channel of the layer. Refused where
    the value between is read elsewhere, the constant varies along other dimensions, weights are
    not constant, a large weight is shared, or a shift would have to reach zero padding. In
    that case the scale stays as well: `x + b/s` with s in the weights is no faster than `x·s + b`.

    Attributes:
        copy_limit: a shared weight of at most this many bytes is folded in a copy.
    """

    name = "fold_affine"
    effect = APPROX(rtol=1e-4, atol=1e-6)
    after = ("canonicalize",)

    copy_limit: int = 1 << 16

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rules until none fits."""
        notes = NoteBook()
        rules: tuple[Rule[Any], ...] = (
            Rule("turn matmul into linear", (aten.matmul.default,), _constant_matmul, _as_linear),
            Rule(
                "fold affine into the layer before",
                _STEPS,
                _follows_layer,
                _into_layer_before,
                self._check_before,
            ),
            Rule(
                "fold affine into the layer after",
                _affine.LAYERS,
                _precedes_layer,
                _into_layer_after,
                self._check_after,
            ),
            Rule(
                "move multiplication behind zero padding",
                (aten.constant_pad_nd.default,),
                _padded_product,
                _behind_padding,
                self._check_moved,
            ),
            Rule("merge affine chain", _STEPS, _shorter_chain, _merged),
        )
        apply_rules(graph, rules, notes)
        return notes.result()

    def _check_before(self, gm: fx.GraphModule, match: tuple[Layer, Step]) -> Refusal | None:
        into, step = match
        affine = _per_channel(step, into.out_axis)
        if affine is None:
            return _not_per_channel(step)
        return (
            _affine.readers_problem(into.node, step.node)
            or _affine.weight_problem(gm, into, self.copy_limit)
            or _affine.overflow_problem(gm, into, affine, after=True)
        )

    def _check_after(self, gm: fx.GraphModule, match: tuple[Layer, Step]) -> Refusal | None:
        into, step = match
        return self._check_into(gm, into, step, into.node)

    def _check_moved(
        self, gm: fx.GraphModule, match: tuple[fx.Node, Step, Layer]
    ) -> Refusal | None:
        pad, step, into = match
        return self._check_into(gm, into, step, pad)

    def _check_into(
        self, gm: fx.GraphModule, into: Layer, step: Step, reader: fx.Node
    ) -> Refusal | None:
        """Why the layer's weights cannot take a step before it, which `reader` alone must read."""
        affine = _per_channel(step, into.in_axis)
        if affine is None:
            return _not_per_channel(step)
        return (
            _affine.readers_problem(step.node, reader)
            or _affine.weight_problem(gm, into, self.copy_limit)
            or _affine.border_problem(into, affine)
            or _affine.overflow_problem(gm, into, affine, after=False)
        )


def _step(gm: fx.GraphModule, node: object) -> Step | None:
    """The node as a multiplication or addition with a constant, if it is one."""
    if not isinstance(node, fx.Node) or not calls(node, *_STEPS) or not is_float(node):
        return None
    x, *others = node.args
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    if not others:
        return Step(node, x, -one, zero) if isinstance(x, fx.Node) else None
    number = _number(gm, others[0])
    flipped = number is None
    if flipped:
        # c / x is no multiplication by a constant; the others are affine either way round.
        number, x = _number(gm, x), others[0]
    if number is None or not isinstance(x, fx.Node) or g.constant(gm, x) is not None:
        return None
    if node.kwargs or len(node.args) > 2 or not same_type(g.value(x), g.value(node)):
        return None
    if calls(node, aten.mul.Tensor):
        return Step(node, x, number, zero)
    if calls(node, aten.div.Tensor):
        return None if flipped or bool((number == 0).any()) else Step(node, x, 1 / number, zero)
    if calls(node, aten.sub.Tensor):
        return Step(node, x, -one, number) if flipped else Step(node, x, one, -number)
    return Step(node, x, one, number)


def _number(gm: fx.GraphModule, operand: object) -> torch.Tensor | None:
    if isinstance(operand, int | float) and not isinstance(operand, bool):
        return torch.tensor(operand, dtype=torch.float64)
    tensor = g.constant(gm, operand)
    return None if tensor is None or tensor.is_complex() else tensor.to(torch.float64)


def _per_channel(step: Step, axis: int) -> Affine | None:
    """The step as one scale and shift for each index along `axis`, if that is all it varies in."""
    dims = rank(step.x)
    channels = g.shape(step.x)[axis]

    def vector(constant: torch.Tensor) -> torch.Tensor | None:
        sizes = [1] * (dims - constant.ndim) + list(constant.shape)
        if any(size != 1 for dim, size in enumerate(sizes) if dim != axis):
            return None
        return constant.reshape(-1).expand(channels)

    scale, shift = vector(step.scale), vector(step.shift)
    return None if scale is None or shift is None else Affine(scale, shift)


def _not_per_channel(step: Step) -> Refusal:
    shapes = (list(step.scale.shape), list(step.shift.shape))
    sizes = max(shapes, key=lambda sizes: len(sizes))
    return Refusal(f"the constant of shape {sizes} varies not only from channel to channel")


def _follows_layer(gm: fx.GraphModule, node: fx.Node) -> tuple[Layer, Step] | None:
    step = _step(gm, node)
    into = _affine.layer(step.x) if step is not None else None
    return (into, step) if into is not None and step is not None else None


def _precedes_layer(gm: fx.GraphModule, node: fx.Node) -> tuple[Layer, Step] | None:
    into = _affine.layer(node)
    step = _step(gm, into.x) if into is not None else None
    if into is None or step is None or g.constant(gm, into.x) is not None:
        return None
    return into, step


def _padded_product(gm: fx.GraphModule, pad: fx.Node) -> tuple[fx.Node, Step, Layer] | None:
    """A product by a constant, and the convolution that alone reads it, behind zero padding.

    There the constant may go into the weights, and the padding into the convolution after it.
    """
    step = _step(gm, pad.args[0])
    a = bind(pad)
    pads_channels = any(a["pad"][2 * (rank(pad) - 2) :])
    if step is None or _shifts(step) or a["value"] != 0 or pads_channels:
        return None
    reader = only_user(pad)
    while reader is not None and calls(reader, aten.constant_pad_nd.default):
        reader = only_user(reader)
    into = None if reader is None else _affine.layer(reader)
    return None if into is None or into.is_linear else (pad, step, into)


def _behind_padding(ed: Editor, match: tuple[fx.Node, Step, Layer]) -> fx.Node:
    pad, step, _ = match
    padded = ed.call(
        aten.constant_pad_nd.default, step.x, *pad.args[1:], origin=g.merge_origins((pad,))
    )
    origin = g.merge_origins((step.node,))
    return ed.call(aten.mul.Tensor, padded, _operand(ed, step, step.scale, origin), origin=origin)


def _into_layer_before(ed: Editor, match: tuple[Layer, Step]) -> fx.Node:
    into, step = match
    affine = _per_channel(step, into.out_axis)
    assert affine is not None
    return _affine.fold_after(ed, into, affine, step.node)


def _into_layer_after(ed: Editor, match: tuple[Layer, Step]) -> fx.Node:
    into, step = match
    affine = _per_channel(step, into.in_axis)
    assert affine is not None
    return _affine.fold_before(ed, into, affine, step.node)


def _chain(gm: fx.GraphModule, node: fx.Node) -> list[Step]:
    """The last up to three steps that end in `node`, first one first; inner ones read once."""
    steps: list[Step] = []
    at: fx.Node = node
    while len(steps) < 3 and (at is node or only_user(at) is not None):
        step = _step(gm, at)
        if step is None:
            break
        steps.insert(0, step)
        at = step.x
    return steps


def _shorter_chain(gm: fx.GraphModule, node: fx.Node) -> tuple[list[Step], Step] | None:
    """Steps, and the one equal to them all, if that takes fewer ops and no more constant data."""
    steps = _chain(gm, node)
    for count in range(len(steps), 0, -1):
        part = steps[-count:]
        whole = _composed(part)
        if whole is not None and _ops(whole) < count:
            return part, whole
    return None


def _composed(steps: list[Step]) -> Step | None:
    scale, shift = steps[0].scale, steps[0].shift
    for step in steps[1:]:
        scale, shift = scale * step.scale, shift * step.scale + step.shift
    largest = max(constant.numel() for step in steps for constant in (step.scale, step.shift))
    if max(scale.numel(), shift.numel()) > largest:
        return None
    if not (_fits(scale, steps[0].x) and _fits(shift, steps[0].x)):
        return None
    return Step(steps[-1].node, steps[0].x, scale, shift)


def _fits(constant: torch.Tensor, like: fx.Node) -> bool:
    """Whether no value of the constant overflows, or vanishes, in the dtype it is to have."""
    rounded = constant.to(g.value(like).dtype)
    return bool((rounded.isfinite() & ((rounded != 0) | (constant == 0))).all())


def _ops(step: Step) -> int:
    return _scales(step) + _shifts(step)


def _scales(step: Step) -> bool:
    return bool((step.scale != 1).any())


def _shifts(step: Step) -> bool:
    return bool((step.shift != 0).any())


def _merged(ed: Editor, match: tuple[list[Step], Step]) -> fx.Node:
    steps, whole = match
    origin = g.merge_origins(step.node for step in steps)
    out = whole.x
    if _scales(whole):
        factor = _operand(ed, whole, whole.scale, origin)
        out = ed.call(aten.mul.Tensor, out, factor, origin=origin)
    if _shifts(whole):
        term = _operand(ed, whole, whole.shift, origin)
        out = ed.call(aten.add.Tensor, out, term, origin=origin)
    return out


def _operand(ed: Editor, step: Step, constant: torch.Tensor, origin: g.Origin) -> float | fx.Node:
    if constant.numel() == 1:
        return float(constant)
    tensor = constant.to(g.value(step.x).dtype)
    return ed.constant(f"{step.node.name}_constant", tensor, origin)


def _constant_matmul(gm: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """matmul by a constant matrix, or by the transposed of one."""
    x, matrix = node.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(matrix, fx.Node) or not is_float(node):
        return None
    if rank(matrix) != 2 or rank(x) < 2 or g.constant(gm, x) is not None:
        return None
    stored: object = matrix
    if calls(matrix, aten.permute.default) and list(matrix.args[1]) == [1, 0]:  # type: ignore[arg-type]
        stored = matrix.args[0]
    return (x, matrix) if g.constant(gm, stored) is not None else None


def _as_linear(ed: Editor, match: tuple[fx.Node, fx.Node]) -> fx.Node:
    x, matrix = match
    if calls(matrix, aten.permute.default):
        return ed.call(aten.linear.default, x, matrix.args[0], None)
    tensor = g.constant(ed.gm, matrix)
    assert tensor is not None
    origin = g.merge_origins((matrix,))
    weight = ed.constant(f"{matrix.target}_transposed", tensor.t().contiguous(), origin)
    return ed.call(aten.linear.default, x, weight, None)
