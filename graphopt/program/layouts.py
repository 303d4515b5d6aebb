"""Choosing each tensor's layout: channels in blocks where convolutions work, plain elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Kind
from graphopt.program.layout import PLAIN, blocked, same_bytes
from graphopt.program.partition import is_float, tensor_operands


@dataclass(frozen=True)
class InBlocks:
    """Whether a node is so much faster if what it reads, or makes, is in blocks that moving that
    pays."""

    reads: bool = False
    makes: bool = False


Wants = Callable[[fx.Node], InBlocks]


def assign_layouts(gm: fx.GraphModule, block: int, wants_blocks: Wants) -> dict[fx.Node, str]:
    """A layout for every node that has a value.

    Convolutions make blocked tensors; elementwise ops, pooling, resizing, padding and channel
    concatenation on whole blocks keep them; everything else is plain. A tensor that no blocked op
    reads is made plain at once, so that nobody converts it afterwards, unless its kernel works on
    blocks, as those of depthwise convolutions and of what `wants_blocks` do. What these read
    becomes blocks, too.
    """
    layouts: dict[fx.Node, str] = {}
    wanted = blocked(block)
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        keeps = node.op == "call_function" and (
            _keeps_blocks(node, layouts, wanted, block) or _feeds(node, wants_blocks)
        )
        layouts[node] = wanted if keeps else PLAIN
    returned = set(G.outputs(gm))
    for node in reversed(list(gm.graph.nodes)):
        if node.op != "call_function" or layouts[node] == PLAIN:
            continue
        if same_bytes(G.shape(node), wanted, G.shape(node), PLAIN) and node not in returned:
            continue
        if node not in returned and (
            any(_likes_blocks(user, layouts, wanted) for user in node.users)
            # Whoever wants it plain moves less than the fast kernel saves.
            or makes_blocks(node, wants_blocks)
        ):
            continue
        layouts[node] = PLAIN
    return layouts


def _likes_blocks(user: fx.Node, layouts: dict[fx.Node, str], wanted: str) -> bool:
    """Whether a reader works best on blocks, whatever it makes itself."""
    if user.op != "call_function":
        return False
    folds = OPS[user.target].kind is Kind.REDUCTION or OPS[user.target].name == "convolution"
    return folds or layouts[user] == wanted


def makes_blocks(node: fx.Node, wants_blocks: Wants) -> bool:
    """Whether the fast kernel that computes it, and what is fused behind, works on blocks."""
    if node.op != "call_function":
        return False
    if OPS[node.target].kind is Kind.ELEMENTWISE:
        return any(
            len(x.users) == 1 and G.shape(x) == G.shape(node) and makes_blocks(x, wants_blocks)
            for x in tensor_operands(node)
        )
    return _is_depthwise(node) or wants_blocks(node).makes


def _convolutions_of(node: fx.Node) -> list[fx.Node]:
    """The convolutions whose input it is."""
    return [
        user
        for user in node.users
        if user.op == "call_function"
        and OPS[user.target].name == "convolution"
        and Call(user)["input"] is node
    ]


def _feeds(node: fx.Node, wants_blocks: Wants) -> bool:
    """Whether a convolution reads it that wants blocks."""
    op = OPS[node.target]
    if op.kind is Kind.ANCHOR and op.name not in _RULES:
        return False
    if len(G.shape(node)) < 3 or not is_float(node):
        return False
    return any(wants_blocks(user).reads for user in _convolutions_of(node))


def _is_depthwise(node: fx.Node) -> bool:
    if OPS[node.target].name != "convolution":
        return False
    call = Call(node)
    return call["groups"] > 1 and call.shape_of("weight")[1] == 1 and not call["transposed"]


def _keeps_blocks(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    op = OPS[node.target]
    if len(G.shape(node)) < 3 or not is_float(node):
        return False
    rule = _RULES.get(op.name)
    if rule is not None and rule(node, layouts, wanted, block):
        return True
    if op.kind in (Kind.INJECTIVE, Kind.VIEW):
        return _feeds_depthwise(node) or _is_moved_image(node)
    if op.kind is Kind.ELEMENTWISE:
        operands = tensor_operands(node)
        alike = any(layouts[x] == wanted and G.shape(x) == G.shape(node) for x in operands)
        whole = G.shape(node)[1] % block == 0
        return alike and (whole or all(_may_overread(x, node, layouts, wanted) for x in operands))
    return False


def _may_overread(
    operand: fx.Node, node: fx.Node, layouts: dict[fx.Node, str], wanted: str
) -> bool:
    """Whether a kernel may read the operand at the padding channels of the last block.

    Blocked tensors have them, a single channel is read at 0, and constants of one pixel have zeros
    behind them, results in the arena at least memory; elsewhere the read would leave the buffer.
    """
    rank = len(G.shape(node))
    extents = (1,) * (rank - len(G.shape(operand))) + G.shape(operand)
    one_pixel = all(extent == 1 for extent in extents[2:])
    is_constant = operand.op == "get_attr" and extents[0] == 1
    has_more_behind = one_pixel and (is_constant or _in_arena(operand))
    return layouts[operand] == wanted or extents[1] == 1 or has_more_behind


def _in_arena(node: fx.Node) -> bool:
    """Whether the node's value is not in memory of the caller or a constant."""
    while node.op == "call_function" and OPS[node.target].kind is Kind.VIEW:
        node = tensor_operands(node)[0]
    return node.op == "call_function"


Rule = Callable[[fx.Node, dict[fx.Node, str], str, int], bool]


def _always(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    return True


def _follow(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    source = tensor_operands(node)[0]
    return layouts[source] == wanted and G.shape(source)[:2] == G.shape(node)[:2]


def _mean(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    call = Call(node)
    return _follow(node, layouts, wanted, block) and bool(call.arguments.get("keepdim"))


def _resize(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    return _follow(node, layouts, wanted, block) or _feeds_depthwise(node)


def _slice(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    call = Call(node)
    source = call["self"]
    if layouts[source] != wanted:
        return False
    dim = call["dim"] % len(G.shape(node))
    return dim != 1 or ((call["start"] or 0) % block == 0 and call["step"] == 1)


def _index_select(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    """Of rows or columns, as in padding by reflection."""
    return Call(node)["dim"] % len(G.shape(node)) >= 2 and _follow(node, layouts, wanted, block)


def _cat(node: fx.Node, layouts: dict[fx.Node, str], wanted: str, block: int) -> bool:
    parts = tensor_operands(node)
    if any(layouts[part] != wanted for part in parts):
        return False
    dim = Call(node)["dim"] % len(G.shape(node))
    return dim != 1 or all(G.shape(part)[1] % block == 0 for part in parts[:-1])


def _feeds_depthwise(node: fx.Node) -> bool:
    """What is moved anyway, before a depthwise convolution, which only works on blocks.

    A channel shuffle, say, or a slice of a plain tensor.
    """
    return len(G.shape(node)) == 4 and any(map(_is_depthwise, _convolutions_of(node)))


def _is_moved_image(node: fx.Node) -> bool:
    """What becomes an image by moving every element anyway, as a transformer's tokens do.

    Such a move reads and writes vectors of channels if it makes blocks, and what reads them is
    faster, too.
    """
    source = node
    if OPS[node.target].name == "reshape":
        source = tensor_operands(node)[0]
        if source.op != "call_function" or len(source.users) > 1:
            return False
    if len(G.shape(node)) != 4 or OPS[source.target].name != "permute":
        return False
    moved = Call(source)["self"]
    rank = len(G.shape(source))
    last = [dim % rank for dim in Call(source)["dims"]].index(rank - 1)
    # The channels have to be the tokens' last axis.
    if last != 1 or G.shape(source)[1] != G.shape(node)[1] or G.shape(moved)[-1] == 1:
        return False
    return any(
        user.op == "call_function" and OPS[user.target].name in _IMAGE_READERS
        for user in node.users
    )


_IMAGE_READERS = (
    "cat", "convolution", "max_pool2d", "avg_pool2d", "upsample_nearest", "upsample_linear",
)  # fmt: skip

_RULES: dict[str, Rule] = {
    "convolution": _always,
    "max_pool2d": _follow,
    "avg_pool2d": _follow,
    "max_pool3d": _follow,
    "avg_pool3d": _follow,
    "adaptive_avg_pool2d": _follow,
    "adaptive_max_pool2d": _follow,
    "mean": _mean,
    "sum": _mean,
    "amax": _mean,
    "amin": _mean,
    "pad": _follow,
    "upsample_nearest": _follow,
    "upsample_linear": _resize,
    "slice": _slice,
    "index_select": _index_select,
    "cat": _cat,
    "clone": _follow,
}
