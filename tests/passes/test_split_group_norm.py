"""split_group_norm: what becomes means, in which steps, and what stays rows."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, changes, ops, refusals, run
from test_fold_batch_norm import conv, draw
from torch import fx

from graphopt import graph as g
from graphopt.passes import Context, default_pipeline, run_passes
from graphopt.passes.split_group_norm import SplitGroupNorm

SPLIT = "split group norm"


def image(b: Build, n: int, channels: int, *space: int) -> fx.Node:
    """What a convolution makes."""
    x = b.input(n, 3, *space)
    weight = b.const(draw(channels, 3, *[1] * len(space)))
    dims = len(space)
    rest = ([1] * dims, [0] * dims, [1] * dims, False, [0] * dims, 1)
    return b.call(aten.convolution.default, x, weight, None, *rest)


def rows(b: Build, x: fx.Node, groups: int, *, flat: bool = True) -> fx.Node:
    """The groups' rows: flat, or with channels and pixels apart."""
    n, channels, *space = g.shape(x)
    apart = [n, groups, -1] if flat else [n, groups, channels // groups, *space]
    return b.call(aten.reshape.default, x, apart)


def group_norm(b: Build, x: fx.Node, groups: int, *, flat: bool = True) -> fx.Node:
    apart = rows(b, x, groups, flat=flat)
    norm = b.call(aten.layer_norm.default, apart, list(g.shape(apart)[2:]), None, None, 1e-5, True)
    return b.call(aten.reshape.default, norm, list(g.shape(x)))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 2),
    st.sampled_from([(6, 1), (6, 2), (6, 6), (16, 4), (5, 5)]),
    st.sampled_from([(7,), (5, 4), (3, 4, 2)]),
    st.booleans(),
)
def test_groups_of_images(
    n: int, channels: tuple[int, int], space: tuple[int, ...], flat: bool
) -> None:
    b = Build()
    gm = b.done(group_norm(b, image(b, n, channels[0], *space), channels[1], flat=flat))
    assert changes(run(gm, SplitGroupNorm())) == {SPLIT: 1}
    assert "layer_norm" not in ops(gm)


def test_the_steps_of_a_group_norm() -> None:
    b = Build()
    gm = b.done(group_norm(b, image(b, 1, 16, 5, 4), 2))
    run(gm, SplitGroupNorm())
    of_channels, of_groups = ["mean", "reshape", "mean"], ["expand", "reshape"]
    assert ops(gm)[1:] == [
        *of_channels, *of_groups,
        *("sub", "mul"), *of_channels, "add", "rsqrt", *of_groups,
        *("sub", "mul"), "reshape", "reshape",
    ]  # fmt: skip


def test_instance_norm_needs_no_second_mean() -> None:
    b = Build()
    norm = b.call(aten.layer_norm.default, image(b, 2, 5, 4, 4), [4, 4], None, None, 1e-5, True)
    gm = b.done(norm)
    assert changes(run(gm, SplitGroupNorm())) == {SPLIT: 1}
    assert ops(gm)[1:] == ["mean", "sub", "mul", "mean", "add", "rsqrt", "sub", "mul"]


def test_between_it_and_the_convolution_blocks_may_be_kept() -> None:
    b = Build()
    x = b.call(aten.hardswish.default, image(b, 1, 8, 5, 5))
    x = b.call(aten.add.Tensor, b.input(1, 8, 5, 5), b.call(aten.silu.default, x))
    x = b.call(aten.constant_pad_nd.default, x, [1, 1, 1, 1], 0.0)
    gm = b.done(group_norm(b, b.call(aten.max_pool2d.default, x, [2, 2], [2, 2]), 2))
    assert changes(run(gm, SplitGroupNorm())) == {SPLIT: 1}


def refused(gm: fx.GraphModule) -> str:
    result = run(gm, SplitGroupNorm())
    assert not result.changed
    return refusals(result)[SPLIT]


def test_rows_of_plain_memory_stay() -> None:
    """Between no convolutions, tokens of a transformer say, layer_norm is faster."""
    b = Build()
    x = b.call(aten.relu.default, b.input(2, 6, 5))
    gm = b.done(b.call(aten.layer_norm.default, x, [5], None, None, 1e-5, True))
    assert refused(gm) == "it does not follow a convolution: rows of plain memory are faster"


def test_a_single_pixel_stays() -> None:
    b = Build()
    gm = b.done(group_norm(b, image(b, 1, 8, 1, 1), 2))
    assert refused(gm) == "an image of one pixel lies in memory as the rows do"


def test_a_weight_for_each_pixel_stays() -> None:
    b = Build()
    x, weight = image(b, 1, 4, 3, 3), b.const(draw(3, 3))
    gm = b.done(b.call(aten.layer_norm.default, x, [3, 3], weight, None, 1e-5, True))
    assert refused(gm) == "its weight or bias varies inside a group"


def test_double_precision_stays() -> None:
    b = Build()
    x = b.input(1, 4, 3, 3, dtype=torch.float64)
    gm = b.done(b.call(aten.layer_norm.default, x, [3, 3], None, None, 1e-5, True))
    assert refused(gm) == "sums in torch.float64 would round differently"


def test_channels_last_are_not_matched() -> None:
    b = Build()
    x = b.call(aten.permute.default, image(b, 1, 8, 4, 4), [0, 2, 3, 1])
    gm = b.done(b.call(aten.layer_norm.default, x, [8], None, None, 1e-5, True))
    result = run(gm, SplitGroupNorm())
    assert not result.changed
    assert refusals(result) == {}


def test_whole_pipeline_leaves_the_affine_part_to_the_next_layer() -> None:
    """And a second run gives the same graph: its differences are not merged."""
    b = Build()
    x = image(b, 1, 8, 4, 4)
    norm = b.call(aten.group_norm.default, x, 2, b.const(draw(8)), b.const(draw(8)), 1e-5)
    gm = b.done(conv(b, norm, b.const(draw(4, 8, 1, 1))))
    run_passes(gm, default_pipeline(), Context(verify=2))
    made = ops(gm)
    assert made[-3:] == ["sub", "mul", "convolution"]
    assert made.count("sub") == 2
    run_passes(gm, default_pipeline(), Context(verify=2))
    assert ops(gm) == made
