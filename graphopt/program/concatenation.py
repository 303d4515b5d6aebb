"""Concatenation without copies: the parts are written where the whole will lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Kind
from graphopt.program.ir import ALIGNMENT
from graphopt.program.layout import physical_size, same_bytes


@dataclass
class InPlace:
    """Which tensors are pieces of larger ones.

    Attributes:
        pieces: tensor to the one that holds it, which no other holds, and the offset in bytes.
        joined: concatenations that need no kernel, as all their parts are where they belong.
    """

    pieces: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    joined: set[fx.Node] = field(default_factory=set)


def plan_concatenations(gm: fx.GraphModule, layouts: Mapping[fx.Node, str]) -> InPlace:
    """Find the concatenations whose parts can be computed in place.

    Later ones go first: where each layer sees all layers before (DenseNet), the earlier
    concatenations are then the beginning of the last one.
    """
    plan = InPlace()
    returned = set(G.outputs(gm))
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or OPS[node.target].name != "cat" or node in returned:
            continue
        parts = list(Call(node)["tensors"])
        offsets = _offsets(node, parts, layouts)
        if offsets is None:
            continue
        holder, base = plan.pieces.get(node, (node, 0))
        wanted = {part: (holder, base + at) for part, at in zip(parts, offsets, strict=True)}
        free = all(part not in plan.pieces and part not in returned for part in parts)
        if free:
            plan.pieces.update(wanted)
            plan.joined.add(node)
        elif node not in plan.pieces and (place := _found(plan, parts, offsets)):
            plan.pieces[node] = place
            plan.joined.add(node)
    return plan


def _found(plan: InPlace, parts: list[fx.Node], offsets: list[int]) -> tuple[fx.Node, int] | None:
    """Where all parts already lie side by side, the place of the first."""
    places = [plan.pieces.get(part) for part in parts]
    first = places[0]
    if first is None:
        return None
    wanted = [(first[0], first[1] + at) for at in offsets]
    return first if places == wanted else None


def _offsets(
    node: fx.Node, parts: list[fx.Node], layouts: Mapping[fx.Node, str]
) -> list[int] | None:
    """Where each part begins in the whole, in bytes; None where one cannot be computed there."""
    shape = G.shape(node)
    dim = Call(node)["dim"] % len(shape)
    if prod(shape[:dim]) != 1 or len(set(parts)) != len(parts):
        return None
    offsets, at = [], 0
    for part in parts:
        same_kind = G.value(part).dtype == G.value(node).dtype and layouts[part] == layouts[node]
        if not same_kind or not _has_kernel(part, layouts) or at % ALIGNMENT:
            return None
        offsets.append(at)
        at += physical_size(G.shape(part), layouts[part], G.value(part).element_size())
    whole = physical_size(shape, layouts[node], G.value(node).element_size())
    return offsets if at == whole else None


def _has_kernel(node: fx.Node, layouts: Mapping[fx.Node, str]) -> bool:
    """Whether the tensor is computed, and not another name for one that is."""
    if node.op != "call_function":
        return False
    if OPS[node.target].kind is not Kind.VIEW:
        return True
    source = Call(node).operands(OPS[node.target].operands)[0]
    return not same_bytes(G.shape(source), layouts[source], G.shape(node), layouts[node])
