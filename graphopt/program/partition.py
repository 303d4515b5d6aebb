"""Grouping graph nodes into kernels: an anchor with what is fused before and after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Kind
from graphopt.program.layout import same_bytes

_MAX_NODES = 48
"""Nodes in one group; keeps a kernel's expressions and its compile time bounded."""

_MAX_HEAVY = 6
"""Transcendental functions in one group; keeps registers and compile time bounded."""

_GUARDS = ("pad", "cat")
_MOVES = ("permute", "expand", "slice", "select", "reshape", "clone")
"""A guard reads its operand only where there is one. What is fused behind it must be one
expression: functions and gathers bind values first, and those reads would happen everywhere."""

READERS = ("attention",)
"""Anchors that read their operands through permutes and slices instead of waiting for a copy, and
store their result through permutes."""

_READ_BACK = ("scatter_reduce", "index_add")
"""Anchors that read what they have stored: it may not be changed on the way."""

HEADS = (Kind.ANCHOR, Kind.REDUCTION)


@dataclass
class NodeGroup:
    """Nodes that become one kernel, or none where it is only another name for the same bytes.

    Attributes:
        root: the node whose value is stored.
        nodes: all nodes, in graph order.
        anchor: the node with a generator of its own or the reduction; None for a map.
        alias: the root needs no kernel: a view that shares its operand's memory, a concatenation
            whose parts are where they belong, or a slice that is read where it lies.
        before: the group that makes what the anchor reads first, if this one's kernel makes it.
    """

    root: fx.Node
    nodes: list[fx.Node] = field(default_factory=list)
    anchor: fx.Node | None = None
    alias: bool = False
    before: NodeGroup | None = None


def tensor_operands(node: fx.Node) -> list[fx.Node]:
    """The node's tensor operands in the order of its OpDef."""
    operands = Call(node).operands(OPS[node.target].operands)
    return [operand for operand in operands if isinstance(operand, fx.Node)]


def partition(
    gm: fx.GraphModule, layouts: Mapping[fx.Node, str], unmoved: Collection[fx.Node] = ()
) -> list[NodeGroup]:
    """Cut the graph into groups, in an order in which they can run.

    A node joins the group of an operand where nothing outside reads that operand. Elementwise nodes
    join anchors, reductions and maps; injective nodes join maps; maps join the elementwise,
    injective or axis-folding node that alone reads them, if nothing is computed twice. What is in
    `unmoved` (see `pieces.py`) needs no kernel.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    returned = set(G.outputs(gm))
    group_of: dict[fx.Node, NodeGroup] = {}
    groups: dict[int, NodeGroup] = {}

    def private(node: fx.Node, group: NodeGroup) -> bool:
        """Whether only the group reads it: one node, or several that all work at its place."""
        if node in returned:
            return False
        return len(node.users) == 1 or all(
            effective_kind(reader, layouts) is Kind.ELEMENTWISE
            and G.shape(reader) == G.shape(node)
            and reader in group.nodes
            for reader in _made_of(node, group)
        )

    def merge(group: NodeGroup, other: NodeGroup) -> None:
        group.nodes = sorted([*group.nodes, *other.nodes], key=order.__getitem__)
        group.anchor = group.anchor or other.anchor
        for node in other.nodes:
            group_of[node] = group
        groups.pop(id(other))

    def join(node: fx.Node, kind: Kind, group: NodeGroup, operand: fx.Node) -> bool:
        """Take in the group that computes `operand`, if it can be; says whether it was."""
        other = group_of.get(operand)
        if other is None or other is group or not private(operand, group):
            return False
        together = [*group.nodes, *other.nodes]
        heavy = sum(OPS[member.target].heavy for member in together)
        if len(together) > _MAX_NODES or heavy > _MAX_HEAVY:
            return False
        if other.root is not operand or not _may_join(node, kind, group, other, operand, layouts):
            return False
        merge(group, other)
        return True

    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        kind = effective_kind(node, layouts)
        alias = kind is Kind.VIEW or node in unmoved
        group = NodeGroup(node, [node], node if kind in HEADS else None, alias)
        group_of[node] = group
        groups[id(group)] = group
        if alias or (kind is Kind.ANCHOR and OPS[node.target].name not in READERS):
            continue
        operands = list(dict.fromkeys(tensor_operands(node)))
        for operand in sorted(operands, key=lambda n: _rank(group_of.get(n)), reverse=True):
            join(node, kind, group, operand)
        # What several nodes read (PReLU's input) is only theirs when they all have joined.
        while any(join(node, kind, group, operand) for operand in _read_again(group)):
            pass
    return sorted(groups.values(), key=lambda g: order[g.root])


def join_pairs(
    groups: Sequence[NodeGroup], returned: Collection[fx.Node],
    pays: Callable[[NodeGroup, NodeGroup], bool],
) -> list[NodeGroup]:  # fmt: skip
    """Let convolutions make what they alone read themselves, where it pays; see `before`.

    Args:
        groups: in an order in which they can run.
        returned: the model's outputs.
        pays: whether the second group should make what the first one does.
    """
    convolutions = [(group, call) for group in groups if (call := _convolution(group))]
    makers = {group.root: group for group, _ in convolutions}
    joined = set()
    for group, call in convolutions:
        maker = makers.get(call["input"])
        if maker is None or len(maker.root.users) > 1 or maker.root in returned:
            continue
        if pays(maker, group):
            group.before = maker
            joined.add(maker.root)
    return [group for group in groups if group.root not in joined]


def _convolution(group: NodeGroup) -> Call | None:
    anchor = group.anchor
    return Call(anchor) if anchor and OPS[anchor.target].name == "convolution" else None


def effective_kind(node: fx.Node, layouts: Mapping[fx.Node, str]) -> Kind:
    """The op's kind; a view whose bytes would have to move counts as injective."""
    kind = OPS[node.target].kind
    if kind is not Kind.VIEW:
        return kind
    source = tensor_operands(node)[0]
    stays = layouts[source] == layouts[node] and G.shape(source) == G.shape(node)
    if stays or same_bytes(G.shape(source), layouts[source], G.shape(node), layouts[node]):
        return Kind.VIEW
    return Kind.INJECTIVE


def _made_of(node: fx.Node, group: NodeGroup) -> list[fx.Node]:
    """All that is computed from the node, up to the group's root and no further."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in found:
                found[user] = None
                stack += [user] if user in group.nodes and user is not group.root else []
    return list(found)


def _read_again(group: NodeGroup) -> list[fx.Node]:
    """Values outside that several nodes of the group read, the last first."""
    inside = set(group.nodes)
    read = [x for member in reversed(group.nodes) for x in tensor_operands(member)]
    return [x for x in dict.fromkeys(read) if x not in inside and len(x.users) > 1]


def _rank(group: NodeGroup | None) -> int:
    """Which operand's group to join first: the one with the most work."""
    if group is None or group.alias:
        return 0
    if group.anchor is None:
        return 1
    return 3 if OPS[group.anchor.target].kind is Kind.ANCHOR else 2


def _may_join(
    node: fx.Node, kind: Kind, group: NodeGroup, other: NodeGroup, operand: fx.Node,
    layouts: Mapping[fx.Node, str],
) -> bool:  # fmt: skip
    if other.alias:
        return False
    if other.anchor is not None:
        if OPS[node.target].name == "permute":
            return OPS[other.anchor.target].name in READERS and _keeps_last_axis(node)
        if OPS[other.anchor.target].name in _READ_BACK:
            return False
        # As epilogue: the node works on exactly what the anchor computes, in its iteration order.
        return (
            kind is Kind.ELEMENTWISE
            and group.anchor is None
            and G.shape(node) == G.shape(operand)
            and all(G.shape(n) == G.shape(node) for n in group.nodes if n is not node)
        )
    if group.anchor is not None and group.anchor is not node:
        # The group already has an anchor from another operand: the map would be an epilogue's
        # operand, computed where it is read.
        return _cheap(other) and G.shape(operand) == G.shape(node)
    if kind is Kind.ANCHOR:
        # Rows stay contiguous: the last axis may not move.
        return _only_moves(other) and all(_keeps_last_axis(member) for member in other.nodes)
    if OPS[node.target].name in _GUARDS and not _only_moves(other):
        return False
    if kind is Kind.REDUCTION:
        folds_axes = OPS[node.target].name in ("mean", "sum", "amax", "amin", "prod")
        return folds_axes and layouts[operand] == layouts[_largest_read(other, operand)]
    repeats = prod(G.shape(node)) > prod(G.shape(operand))
    return not repeats or _cheap(other)


def _largest_read(group: NodeGroup, default: fx.Node) -> fx.Node:
    """What the group reads most of, constants left out; the first of several, the default if
    none."""
    reads = [
        operand
        for member in group.nodes
        for operand in tensor_operands(member)
        if operand not in group.nodes and operand.op != "get_attr"
    ]
    return max(reads, key=lambda node: prod(G.shape(node)), default=default)


def _keeps_last_axis(node: fx.Node) -> bool:
    call = Call(node)
    rank = len(call.shape)
    if OPS[node.target].name == "permute":
        return bool(call["dims"][-1] % rank == rank - 1)
    return OPS[node.target].name == "slice" and call["step"] == 1


def _only_moves(group: NodeGroup) -> bool:
    """Whether every node of the group reads one element at a place known from its index."""
    return all(OPS[member.target].name in _MOVES for member in group.nodes)


def _cheap(group: NodeGroup) -> bool:
    """Whether the group only moves data, so that computing an element twice costs little."""
    return all(OPS[n.target].kind is Kind.INJECTIVE for n in group.nodes) and len(group.nodes) < 4


def is_float(node: fx.Node) -> bool:
    """Whether the node's value is float32."""
    return G.value(node).dtype == torch.float32
