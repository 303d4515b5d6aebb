"""Concatenation and slicing without copies: tensors that are pieces of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Kind
from graphopt.program.ir import ALIGNMENT
from graphopt.program.layout import block_of, physical_size, same_bytes
from graphopt.program.partition import HEADS, READERS, effective_kind, tensor_operands


@dataclass
class Pieces:
    """Which tensors are pieces of larger ones.

    Attributes:
        within: tensor to the one that holds it, which no other holds, and the offset in bytes.
        unmoved: tensors that need no kernel: concatenations whose parts are where they belong, and
            slices that are read where they lie.
    """

    within: dict[fx.Node, tuple[fx.Node, int]] = field(default_factory=dict)
    unmoved: set[fx.Node] = field(default_factory=set)


def plan_pieces(gm: fx.GraphModule, layouts: Mapping[fx.Node, str]) -> Pieces:
    """Find the concatenations and the slices that need no copy."""
    plan = Pieces()
    returned = set(G.outputs(gm))
    calls = [node for node in gm.graph.nodes if node.op == "call_function" and node not in returned]
    # Later ones go first: where each layer sees all layers before (DenseNet), the earlier
    # concatenations are then the beginning of the last one.
    for node in reversed(calls):
        if OPS[node.target].name == "cat":
            _join(node, plan, layouts, returned)
    for node in gm.graph.nodes:
        _read_slices(node, plan, layouts, returned)
    return plan


def _join(
    node: fx.Node, plan: Pieces, layouts: Mapping[fx.Node, str], returned: set[fx.Node]
) -> None:
    """Plan a concatenation whose parts can be computed where the whole lies."""
    parts = list(Call(node)["tensors"])
    offsets = _offsets(node, parts, layouts)
    if offsets is None:
        return
    holder, base = plan.within.get(node, (node, 0))
    if all(part not in plan.within and part not in returned for part in parts):
        for part, at in zip(parts, offsets, strict=True):
            plan.within[part] = (holder, base + at)
        plan.unmoved.add(node)
    elif node not in plan.within and (place := _found(plan, parts, offsets)):
        plan.within[node] = place
        plan.unmoved.add(node)


def _read_slices(
    source: fx.Node, plan: Pieces, layouts: Mapping[fx.Node, str], returned: set[fx.Node]
) -> None:
    """Plan the slices of a tensor that are read where they lie.

    Only those that would be copied otherwise: maps and attention read through slices. The whole
    stays in the arena as long as one of its slices, which have to be half of it at least.
    """
    owner = source
    while owner.op == "call_function" and not _has_kernel(owner, layouts):
        owner = tensor_operands(owner)[0]
    if owner.op != "call_function" or owner in returned or _is_fused(source, layouts):
        return
    holder, base = plan.within.get(owner, (owner, 0))
    found: dict[fx.Node, int] = {}
    for user in source.users:
        offset = _offset(user, source, layouts)
        waits = any(_needs_buffer(reader) for reader in user.users)
        if offset is None or user in plan.within or user in returned or not waits:
            continue
        if (base + offset) % ALIGNMENT == 0:
            found[user] = base + offset
    if 2 * sum(prod(G.shape(node)) for node in found) < prod(G.shape(source)):
        return
    for node, offset in found.items():
        plan.within[node] = (holder, offset)
        plan.unmoved.add(node)


def _offset(node: fx.Node, source: fx.Node, layouts: Mapping[fx.Node, str]) -> int | None:
    """Where a slice begins in its source, in bytes; None if its elements do not lie together."""
    if node.op != "call_function" or OPS[node.target].name != "slice":
        return None
    call, shape, layout = Call(node), G.shape(source), layouts[source]
    dim = call["dim"] % len(shape)
    if layouts[node] != layout or call["step"] != 1 or prod(shape[:dim]) != 1:
        return None
    start = slice(call["start"], None).indices(shape[dim])[0]
    end = start + G.shape(node)[dim]
    block = block_of(layout)
    if block is not None and (dim > 1 or start % block or (end % block and end < shape[1])):
        return None
    before = (*shape[:dim], start, *shape[dim + 1 :])
    return physical_size(before, layout, G.value(node).element_size())


def _needs_buffer(reader: fx.Node) -> bool:
    """Whether a node's kernel reads its operands from memory, and not through slices."""
    if reader.op != "call_function" or OPS[reader.target].name in READERS:
        return False
    return OPS[reader.target].kind in HEADS


def _is_fused(node: fx.Node, layouts: Mapping[fx.Node, str]) -> bool:
    """Whether the node is computed inside the kernel of its only reader."""
    return len(node.users) == 1 and effective_kind(node, layouts) in (
        Kind.ELEMENTWISE,
        Kind.INJECTIVE,
    )


def _found(plan: Pieces, parts: list[fx.Node], offsets: list[int]) -> tuple[fx.Node, int] | None:
    """Where all parts already lie side by side, the place of the first."""
    places = [plan.within.get(part) for part in parts]
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
    source = tensor_operands(node)[0]
    return not same_bytes(G.shape(source), layouts[source], G.shape(node), layouts[node])
