"""Grouping nodes into kernels."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.program.layouts import InBlocks, assign_layouts
from graphopt.program.partition import NodeGroup, partition, tensor_operands
from tests.backends.harness import Builder, aten, check


def groups(b: Builder) -> list[NodeGroup]:
    """The groups, after checking that they are a partition in an order that can run."""
    gm = b.finish()
    found = partition(gm, assign_layouts(gm, 8, lambda _: InBlocks()))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert sorted(n.name for g in found for n in g.nodes) == sorted(n.name for n in calls)
    done = {node for node in gm.graph.nodes if node.op != "call_function"}
    for group in found:
        assert group.root is group.nodes[-1]
        inside = set(group.nodes)
        needed = {x for node in group.nodes for x in tensor_operands(node)} - inside
        assert needed <= done, "reads what is not there yet"
        done.add(group.root)
        for node in group.nodes[:-1]:
            assert set(node.users) <= inside, "hides a value that others read"
            assert node not in G.outputs(gm)
    return found


def names(b: Builder) -> list[list[str]]:
    return [[OPS[n.target].name for n in group.nodes] for group in groups(b)]


def test_anchor_takes_bias_residual_and_activation() -> None:
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 6, 6)), 8, (1, 1))
    y = b.op(aten.add.Tensor, b.conv(x, 8, (3, 3), padding=1), x)
    b.returns(b.op(aten.relu.default, y))
    assert names(b) == [["convolution"], ["convolution", "add", "relu"]]


def test_only_one_of_two_anchors_takes_their_sum() -> None:
    b = Builder()
    x = b.input(b.random(1, 3, 6, 6))
    b.returns(b.op(aten.add.Tensor, b.conv(x, 8, (1, 1)), b.conv(x, 8, (3, 3), padding=1)))
    found = names(b)
    assert sorted(map(len, found)) == [1, 2]


def test_a_value_read_twice_or_returned_is_stored() -> None:
    b = Builder()
    x = b.op(aten.exp.default, b.input(b.random(4, 4)))
    y = b.op(aten.neg.default, x)
    z = b.op(aten.sqrt.default, y)
    b.returns(x, z, b.op(aten.permute.default, x, [1, 0]))
    assert names(b) == [["exp"], ["neg", "sqrt"], ["permute"]]


def prelu(b: Builder, x: fx.Node, slopes: torch.Tensor) -> fx.Node:
    """As `canonicalize` writes it."""
    negative = b.op(aten.lt.Scalar, x, 0)
    return b.op(aten.where.self, negative, b.op(aten.mul.Tensor, x, b.constant(slopes)), x)


def test_a_value_read_twice_in_one_group_is_not_stored() -> None:
    """PReLU reads its input three times; what moves elements reads them elsewhere."""
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 6, 6)), 8, (1, 1))
    e = b.op(aten.exp.default, b.input(b.random(4, 4)))
    both = b.op(aten.add.Tensor, b.op(aten.neg.default, e), b.op(aten.sqrt.default, e))
    f = b.op(aten.exp.default, b.input(b.random(4, 4)))
    turned = b.op(aten.add.Tensor, f, b.op(aten.permute.default, f, [1, 0]))
    y = b.conv(b.input(b.random(1, 3, 6, 6)), 8, (1, 1))
    across = b.op(aten.permute.default, b.op(aten.neg.default, y), [0, 1, 3, 2])
    later = b.op(aten.add.Tensor, b.op(aten.relu.default, y), across)
    b.returns(prelu(b, x, b.random(8, 1, 1)), both, turned, later)
    assert sorted(names(b)) == [
        ["convolution"],
        ["convolution", "lt", "mul", "where"],
        ["exp"],
        ["exp", "neg", "sqrt", "add"],
        ["neg", "permute", "relu", "add"],
        ["permute", "add"],
    ]


def test_values_read_twice_after_anchors() -> None:
    """After convolutions with whole and ragged blocks, Winograd, pooling, a product and softmax."""
    b = Builder(9)
    x = b.conv(b.input(b.random(1, 3, 9, 9)), 16, (1, 1))
    for y in (
        b.conv(x, 16, (3, 3), padding=1),
        b.conv(x, 12, (3, 3), padding=1),
        b.conv(x, 16, (3, 3), groups=16),
        b.op(aten.max_pool2d.default, x, [2, 2]),
    ):
        act = prelu(b, y, b.random(G.shape(y)[1], 1, 1))
        b.returns(b.conv(act, 5, (3, 3)), b.op(aten.neg.default, act))
    weight = b.constant(b.random(12, 16))
    rows = b.op(aten.linear.default, b.input(b.random(5, 16)), weight, None)
    b.returns(prelu(b, rows, b.random(12)))
    soft = b.op(aten.softmax.int, b.input(b.random(5, 12)), 1)
    b.returns(b.op(aten.mul.Tensor, soft, b.op(aten.neg.default, soft)))
    program = check(b, tolerance=4e-6)
    assert not [step.ops for step in program.steps if step.ops[0] == "lt"]


def test_nothing_expensive_is_computed_twice() -> None:
    """exp of a row is not recomputed for every row it is broadcast to; moving data is."""
    b = Builder()
    wide = b.input(b.random(50, 8))
    b.returns(b.op(aten.add.Tensor, b.op(aten.exp.default, b.input(b.random(8))), wide))
    row = b.op(aten.slice.Tensor, b.input(b.random(9)), 0, 1, 9)
    b.returns(b.op(aten.add.Tensor, row, wide))
    assert names(b) == [["exp"], ["add"], ["slice", "add"]]


def test_maps_join_the_sums_over_axes_that_read_them() -> None:
    b = Builder()
    x = b.input(b.random(3, 5, 8))
    y = b.op(aten.mean.dim, b.op(aten.square.default, x), [2])
    b.returns(b.op(aten.sqrt.default, y))
    image = b.op(aten.exp.default, b.input(b.random(1, 2, 6, 6)))
    # A window sees elements several times: its operand is stored.
    b.returns(b.op(aten.max_pool2d.default, image, [3, 3], [1, 1]))
    assert names(b) == [["square", "mean", "sqrt"], ["exp"], ["max_pool2d"]]


def test_views_are_names_unless_bytes_move() -> None:
    b = Builder()
    x = b.op(aten.exp.default, b.input(b.random(4, 6)))
    view = b.op(aten.reshape.default, x, [6, 4])
    b.returns(b.op(aten.sum.dim_IntList, view, [0]))
    blocked = b.conv(b.input(b.random(1, 3, 4, 4)), 16, (1, 1))
    moved = b.op(aten.reshape.default, blocked, [1, 4, 64])
    b.returns(b.op(aten.softmax.int, moved, -1), b.conv(blocked, 4, (1, 1)))
    found = groups(b)
    alias = {group.root.name: group.alias for group in found}
    assert alias[view.name] is True
    assert alias[moved.name] is False


def test_groups_stay_small() -> None:
    b = Builder()
    x = b.input(b.random(4))
    for _ in range(120):
        x = b.op(aten.sin.default, x)
    b.returns(x)
    assert max(len(group.nodes) for group in groups(b)) <= 48


def test_a_mean_takes_what_is_computed_from_a_tensor_in_its_blocks() -> None:
    """Where another operand, which is small and plain, comes first, too."""
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 6, 6)), 16, (1, 1))
    middle = b.input(b.random(1, 1, 1, 1))
    apart = b.op(aten.sub.Tensor, middle, x)
    spread = b.op(aten.mean.dim, b.op(aten.mul.Tensor, apart, apart), [2, 3], True)
    b.returns(spread, b.conv(x, 4, (1, 1)))
    assert names(b) == [["convolution"], ["sub", "mul", "mean"], ["convolution"]]
