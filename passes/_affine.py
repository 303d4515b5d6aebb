"""Folding `x * scale + shift` per channel into the weights of the layer before or after it.

In float64, rounded once. Used by `fold_batch_norm` and `fold_affine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind, calls, is_float, only_user, other_readers, rank
from graphopt.passes.rewrite import Editor, Refusal

LAYERS = (aten.convolution.default, aten.linear.default)


@dataclass(frozen=True)
class Affine:
    """`y = x * scale + shift` with one number for each channel, in float64."""

    scale: torch.Tensor
    shift: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """A convolution or linear node, its arguments by name."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rest: dict[str, Any]

    @property
    def is_linear(self) -> bool:
        """Whether it is a linear layer: channels last, one group."""
        return calls(self.node, aten.linear.default)

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution."""
        return bool(self.rest.get("transposed"))

    @property
    def groups(self) -> int:
        """Number of groups of channels."""
        return int(self.rest.get("groups", 1))

    @property
    def out_axis(self) -> int:
        """The channel dimension of the result."""
        return rank(self.node) - 1 if self.is_linear else 1

    @property
    def in_axis(self) -> int:
        """The channel dimension of the input."""
        return rank(self.x) - 1 if self.is_linear else 1


def layer(node: object) -> Layer | None:
    """The node as a layer, if it is one."""
    if not isinstance(node, fx.Node) or not calls(node, *LAYERS):
        return None
    a = bind(node)
    return Layer(node, a.pop("input"), a.pop("weight"), a.pop("bias"), a)


def readers_problem(node: fx.Node, user: fx.Node) -> Refusal | None:
    """A value with other readers has to stay as it is for them."""
    if only_user(node) is user:
        return None
    others = other_readers(node, user)
    return Refusal(f"the result of {node.name} is also read by {others or 'the output'}")


def weight_problem(gm: fx.GraphModule, into: Layer, copy_limit: int) -> Refusal | None:
    """Why the layer's weights cannot be changed; small shared ones can, in a copy."""
    if g.constant(gm, into.weight) is None:
        return Refusal(f"the weight of {into.node.name} is not constant")
    if into.bias is not None and g.constant(gm, into.bias) is None:
        return Refusal(f"the bias of {into.node.name} is not constant")
    if not is_float(into.weight):
        return Refusal(f"the weight of {into.node.name} is not floating point")
    size = g.value(into.weight).nbytes
    if len(into.weight.users) > 1 and size > copy_limit:
        return Refusal(
            f"the weight of {into.node.name} is shared with "
            f"{other_readers(into.weight, into.node)}, and a copy would take {size} bytes"
        )
    return None


def border_problem(into: Layer, affine: Affine) -> Refusal | None:
    """Why a shift before the layer is not one constant after it.

    At a border a convolution reads padding, which is 0 and not 0 + shift; the pixels of a
    transposed convolution each see another part of the kernel.
    """
    if into.is_linear or not bool((affine.shift != 0).any()):
        return None
    if any(into.rest["padding"]) and not into.transposed:
        return Refusal(f"{into.node.name} pads with zeros, which the shift would not reach")
    if not into.transposed:
        return None
    kernel = g.shape(into.weight)[2:]
    plain = all(n == 1 for n in (*kernel, *into.rest["stride"]))
    if plain and not any((*into.rest["padding"], *into.rest["output_padding"])):
        return None
    return Refusal(
        f"{into.node.name} is a transposed convolution: the shift would differ between pixels"
    )


def overflow_problem(
    gm: fx.GraphModule, into: Layer, affine: Affine, after: bool
) -> Refusal | None:
    """Refuses weights that would not be finite any more."""
    weight, bias = _after(gm, into, affine) if after else _before(gm, into, affine)
    if bool(weight.isfinite().all()) and bool(bias.isfinite().all()):
        return None
    return Refusal(f"the weights of {into.node.name} would not be finite")


def fold_after(ed: Editor, into: Layer, affine: Affine, replaced: fx.Node) -> fx.Node:
    """The layer with the affine that follows it in its weights."""
    return _rebuilt(ed, into, *_after(ed.gm, into, affine), replaced)


def fold_before(ed: Editor, into: Layer, affine: Affine, replaced: fx.Node) -> fx.Node:
    """The layer with the affine that precedes it, at `replaced`, in its weights."""
    # The operand that is no constant: `c - x` has it second.
    x = next(arg for arg in replaced.all_input_nodes if g.constant(ed.gm, arg) is None)
    return _rebuilt(ed, into, *_before(ed.gm, into, affine), replaced, x)


def _after(gm: fx.GraphModule, into: Layer, affine: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    """weight[o] * scale[o], bias * scale + shift."""
    weight, bias = _parameters(gm, into, affine.shift)
    groups, tail = into.groups, [1] * (weight.ndim - 2)
    if into.transposed:
        inputs, outputs = weight.shape[:2]
        apart = weight.reshape(groups, inputs // groups, outputs, *weight.shape[2:])
        weight = (apart * affine.scale.reshape(groups, 1, outputs, *tail)).reshape(weight.shape)
    else:
        weight = weight * affine.scale.reshape(-1, 1, *tail)
    return _rounded(gm, into, weight, bias * affine.scale + affine.shift)


def _before(gm: fx.GraphModule, into: Layer, affine: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    """weight[o, i] * scale[i], bias[o] + sum over i of weight[o, i] * shift[i]."""
    weight, bias = _parameters(gm, into, affine.shift)
    groups, taps = into.groups, weight.shape[2:]
    # (groups, outputs, inputs, taps): the one order in which both kinds of weight are the same.
    if into.transposed:
        apart = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *taps)
        apart = apart.transpose(1, 2)
    else:
        apart = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], *taps)
    spread = (groups, 1, apart.shape[2], *[1] * len(taps))
    added = (apart * affine.shift.reshape(spread)).flatten(2).sum(2).reshape(-1)
    scaled = apart * affine.scale.reshape(spread)
    if into.transposed:
        scaled = scaled.transpose(1, 2)
    return _rounded(gm, into, scaled.reshape(weight.shape), bias + added)


def _parameters(
    gm: fx.GraphModule, into: Layer, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, bias = g.constant(gm, into.weight), g.constant(gm, into.bias)
    assert weight is not None
    if bias is None:
        bias = torch.zeros(g.shape(into.node)[into.out_axis])
    return weight.to(like.dtype), bias.to(like.dtype)


def _rounded(
    gm: fx.GraphModule, into: Layer, weight: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = g.value(into.weight).dtype
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


def _rebuilt(
    ed: Editor,
    into: Layer,
    weight: torch.Tensor,
    bias: torch.Tensor,
    replaced: fx.Node,
    x: fx.Node | None = None,
) -> fx.Node:
    origin = g.merge_origins((into.node, replaced))
    stem = str(into.weight.target)
    new_weight = ed.constant(stem, weight, g.merge_origins((into.weight, replaced)))
    # A layer without a bias keeps it so where nothing is added.
    new_bias = None
    if into.bias is not None or bool((bias != 0).any()):
        new_bias = ed.constant(f"{stem}_bias", bias, origin)
    return ed.call(
        into.node.target,  # type: ignore[arg-type]
        *(x if x is not None else into.x, new_weight, new_bias, *into.rest.values()),
        origin=origin,
    )
