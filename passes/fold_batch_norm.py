"""Fold batch normalization into the weights of the layer before or after it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes import _affine
from graphopt.passes._affine import Affine, Layer
from graphopt.passes._canonical import per_channel
from graphopt.passes._nodes import aten, bind, calls, rank
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Refusal, Rule, apply_rules

Match = tuple[Layer, fx.Node]


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalization into the layer before or after it; what cannot becomes mul + add.

    ::

        convolution(x, w) ─ batch_norm     →   convolution(x, w·s, b·s + t)
        batch_norm ─ linear(·, w)          →   linear(x, w·s, b + w·t)
        relu ─ batch_norm ─ relu           →   relu ─ mul(s) ─ add(t) ─ relu

    with s = weight / √(var + eps) and t = bias − mean·s. After the pass no batch_norm is left.
    Refused where the value between is read elsewhere, weights or statistics are not constant, a
    large weight is shared, or a shift before a convolution would have to reach its zero padding.

    Attributes:
        copy_limit: a shared weight of at most this many bytes is folded in a copy.
    """

    name = "fold_batch_norm"
    effect = APPROX(rtol=1e-4, atol=1e-6)
    after = ("canonicalize",)

    copy_limit: int = 1 << 16

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Fold what folds; then split the rest."""
        notes = NoteBook()
        folds = (
            Rule(
                "fold batch_norm into the layer before",
                (aten.batch_norm.default,),
                _follows_layer,
                _into_layer_before,
                self._check_before,
            ),
            Rule(
                "fold batch_norm into the layer after",
                _affine.LAYERS,
                _precedes_layer,
                _into_layer_after,
                self._check_after,
            ),
        )
        apply_rules(graph, folds, notes)
        split = Rule("split batch_norm into mul and add", (aten.batch_norm.default,), _any, _split)
        apply_rules(graph, (split,), notes)
        return notes.result()

    def _check_before(self, gm: fx.GraphModule, match: Match) -> Refusal | None:
        into, norm = match
        affine = _constants(gm, norm)
        if affine is None:
            return Refusal("its statistics are not constant")
        if into.is_linear and rank(norm) != 2:
            return Refusal(
                f"it normalizes dimension 1 of {rank(norm)}, a linear layer gives the last"
            )
        return (
            _affine.readers_problem(into.node, norm)
            or _affine.weight_problem(gm, into, self.copy_limit)
            or _affine.overflow_problem(gm, into, affine, after=True)
        )

    def _check_after(self, gm: fx.GraphModule, match: Match) -> Refusal | None:
        into, norm = match
        affine = _constants(gm, norm)
        if affine is None:
            return Refusal("its statistics are not constant")
        if into.is_linear and rank(norm) != 2:
            return Refusal(
                f"it normalizes dimension 1 of {rank(norm)}, a linear layer reads the last"
            )
        return (
            _affine.readers_problem(norm, into.node)
            or _affine.weight_problem(gm, into, self.copy_limit)
            or _affine.border_problem(into, affine)
            or _affine.overflow_problem(gm, into, affine, after=False)
        )


def _follows_layer(_gm: fx.GraphModule, norm: fx.Node) -> Match | None:
    into = _affine.layer(bind(norm)["input"])
    return (into, norm) if into is not None else None


def _precedes_layer(_gm: fx.GraphModule, node: fx.Node) -> Match | None:
    into = _affine.layer(node)
    if into is None or not calls(into.x, aten.batch_norm.default):
        return None
    return into, into.x


def _into_layer_before(ed: Editor, match: Match) -> fx.Node:
    into, norm = match
    affine = _constants(ed.gm, norm)
    assert affine is not None
    return _affine.fold_after(ed, into, affine, norm)


def _into_layer_after(ed: Editor, match: Match) -> fx.Node:
    into, norm = match
    affine = _constants(ed.gm, norm)
    assert affine is not None
    return _affine.fold_before(ed, into, affine, norm)


def _constants(gm: fx.GraphModule, norm: fx.Node) -> Affine | None:
    """Scale and shift in float64, or None if they are only known at run time."""
    a = bind(norm)
    tensors = {}
    for name in ("weight", "bias", "running_mean", "running_var"):
        tensor = g.constant(gm, a[name])
        if tensor is None and a[name] is not None:
            return None
        tensors[name] = None if tensor is None else tensor.to(torch.float64)
    mean, var = tensors["running_mean"], tensors["running_var"]
    if mean is None or var is None:
        return None
    scale = (var + a["eps"]).rsqrt()
    if tensors["weight"] is not None:
        scale = scale * tensors["weight"]
    shift = -mean * scale
    if tensors["bias"] is not None:
        shift = shift + tensors["bias"]
    return Affine(scale, shift)


def _any(_gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    return node


def _split(ed: Editor, norm: fx.Node) -> fx.Node:
    a = bind(norm)
    x = a["input"]
    affine = _constants(ed.gm, norm)
    if affine is not None:
        dtype, sizes = g.value(norm).dtype, (-1, *[1] * (rank(norm) - 2))
        scale, shift = (
            ed.constant(f"{norm.name}_{name}", tensor.reshape(sizes).to(dtype))
            for name, tensor in (("scale", affine.scale), ("shift", affine.shift))
        )
    else:
        scale, shift = _computed(ed, norm)
    return ed.call(aten.add.Tensor, ed.call(aten.mul.Tensor, x, scale), shift)


def _computed(ed: Editor, norm: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Scale and shift as nodes, for statistics that are inputs or computed."""
    a = bind(norm)
    scale = ed.call(aten.rsqrt.default, ed.call(aten.add.Tensor, a["running_var"], a["eps"]))
    if a["weight"] is not None:
        scale = ed.call(aten.mul.Tensor, scale, a["weight"])
    shift = ed.call(aten.neg.default, ed.call(aten.mul.Tensor, a["running_mean"], scale))
    if a["bias"] is not None:
        shift = ed.call(aten.add.Tensor, shift, a["bias"])
    return per_channel(ed, scale, rank(norm)), per_channel(ed, shift, rank(norm))
