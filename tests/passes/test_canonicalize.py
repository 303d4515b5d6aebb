"""canonicalize: every spelling of an op becomes one, and unknown things stay."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from pass_graphs import Build, aten, changes, ops, refusals, run
from torch import fx

from graphopt import graph as g
from graphopt.passes import Context, run_passes
from graphopt.passes.canonicalize import TABLE, Canonicalize

I64 = torch.int64
Made = fx.Node | tuple[fx.Node, ...]


def image(b: Build) -> fx.Node:
    return b.input(2, 4, 6, 5)


def places(b: Build, *sizes: int) -> fx.Node:
    return b.const(torch.arange(math.prod(sizes)).reshape(sizes) % 3)


def whole(b: Build) -> fx.Node:
    return b.input(3, dtype=torch.int32)


def weight(b: Build, *sizes: int) -> fx.Node:
    return b.const(torch.randn(*sizes, generator=torch.Generator().manual_seed(len(sizes))))


def norm_arguments(b: Build, channels: int) -> list[fx.Node]:
    random = torch.Generator().manual_seed(channels)
    drawn = [torch.rand(channels, generator=random) + 0.5 for _ in range(4)]
    return [b.const(tensor) for tensor in drawn]


def flash_attention(b: Build) -> fx.Node:
    q = b.input(1, 2, 5, 4)
    node = b.gm.graph.call_function(
        aten._scaled_dot_product_flash_attention_for_cpu.default, (q, q, q), {"scale": 0.3}
    )
    out = torch.empty(1, 2, 5, 4, device="meta")
    node.meta.update(val=(out, torch.empty(1, 2, 5, device="meta")), origin=("attention",))
    return b.item(node, 0)


CASES: dict[str, tuple[Callable[[Build], Made], list[str]]] = {
    "view": (lambda b: b.call(aten.view.default, image(b), [2, -1]), ["reshape"]),
    "flatten": (lambda b: b.call(aten.flatten.using_ints, image(b), 1), ["reshape"]),
    "squeeze": (lambda b: b.call(aten.squeeze.dim, b.input(2, 1, 3), 1), ["reshape"]),
    "unsqueeze": (lambda b: b.call(aten.unsqueeze.default, image(b), -1), ["reshape"]),
    "transpose": (lambda b: b.call(aten.transpose.int, image(b), -1, 1), ["permute"]),
    "t": (lambda b: b.call(aten.t.default, b.input(2, 3)), ["permute"]),
    "movedim": (lambda b: b.call(aten.movedim.int, image(b), 1, -1), ["permute"]),
    "negative dims": (
        lambda b: b.call(aten.permute.default, image(b), [0, -1, -2, 1]),
        ["permute"],
    ),
    "expand": (lambda b: b.call(aten.expand.default, b.input(1, 3), [4, -1]), ["expand"]),
    "repeat": (
        lambda b: b.call(aten.repeat.default, b.input(2, 3), [2, 1, 3]),
        ["reshape", "expand", "reshape"],
    ),
    "slice": (lambda b: b.call(aten.slice.Tensor, image(b), -1, -3, 2**63 - 1), ["slice"]),
    "narrow": (lambda b: b.call(aten.narrow.default, image(b), 3, 1, 2), ["slice"]),
    "select": (lambda b: b.call(aten.select.int, image(b), 1, -1), ["slice", "reshape"]),
    "split": (
        lambda b: (lambda s: (b.item(s, 2), b.item(s, 0)))(
            b.call(aten.split.Tensor, image(b), 2, -1)
        ),
        ["slice", "slice"],
    ),
    "split, piece unused": (
        lambda b: (lambda s: (b.item(s, 0), b.item(s, 1))[1])(
            b.call(aten.split_with_sizes.default, image(b), [1, 3], 1)
        ),
        ["slice"],
    ),
    "chunk": (
        lambda b: b.item(b.call(aten.chunk.default, image(b), 4, 2), 2),
        ["slice"],
    ),
    "unbind": (
        lambda b: b.item(b.call(aten.unbind.int, image(b), 1), 3),
        ["slice", "reshape"],
    ),
    "stack": (
        lambda b: b.call(aten.stack.default, [image(b), image(b)], -1),
        ["reshape", "reshape", "cat"],
    ),
    "cat": (lambda b: b.call(aten.cat.default, [image(b), image(b)], -1), ["cat"]),
    "cat of nothing": (
        lambda b: b.call(
            aten.cat.default,
            [b.call(aten.slice.Tensor, image(b), 1, 4, 4, 1), image(b), b.input(0)],
            1,
        ),
        ["cat"],
    ),
    "cat of nothing but its dtype": (
        lambda b: b.call(aten.cat.default, [b.input(0), b.input(2, 3, dtype=torch.int32)], 1),
        ["cat", "_to_copy"],
    ),
    "pad": (lambda b: b.call(aten.pad.default, image(b), [1, 2]), ["constant_pad_nd"]),
    "index": (
        lambda b: b.call(aten.index.Tensor, image(b), [None, b.const(torch.tensor([-1, 0]))]),
        ["index_select"],
    ),
    "index by a matrix": (
        lambda b: b.call(aten.index.Tensor, image(b), [b.const(torch.tensor([[0, 1], [1, -2]]))]),
        ["index_select", "reshape"],
    ),
    "index by rows and columns": (
        lambda b: b.call(
            aten.index.Tensor,
            image(b),
            [None, None, b.const(torch.tensor([[2], [-1]])), b.const(torch.tensor([0, 3, 1]))],
        ),
        ["index_select", "index_select"],
    ),
    "pixel_shuffle": (
        lambda b: b.call(aten.pixel_shuffle.default, image(b), 2),
        ["reshape", "permute", "reshape"],
    ),
    "pixel_unshuffle": (
        lambda b: b.call(aten.pixel_unshuffle.default, b.input(2, 3, 6, 4), 2),
        ["reshape", "permute", "reshape"],
    ),
    "fold": (
        lambda b: b.call(
            aten.col2im.default, b.input(1, 8, 4), [4, 3], [2, 2], [1, 1], [0, 0], [2, 1]
        ),
        [
            "reshape",
            *["slice", "reshape", "slice", "reshape"] * 2,
            *["cat", "reshape", "slice"],
            *["slice", "reshape", "slice", "constant_pad_nd"] * 2,
            *["add", "reshape", "reshape", "slice"],
        ],
    ),
    "index_copy to neighbouring places": (
        lambda b: b.call(
            aten.index_copy.default, image(b), 2, b.const(torch.arange(1, 4)), b.input(2, 4, 3, 5)
        ),
        ["slice", "slice", "cat"],
    ),
    "index_copy to scattered places": (
        lambda b: b.call(
            aten.index_copy.default,
            image(b),
            2,
            b.const(torch.tensor([1, 3, 2])),
            b.input(2, 4, 3, 5),
        ),
        ["index_copy"],
    ),
    "channel_shuffle": (
        lambda b: b.call(aten.channel_shuffle.default, image(b), 2),
        ["reshape", "permute", "reshape"],
    ),
    "upsample by size": (
        lambda b: b.call(aten.upsample_nearest2d.default, image(b), [9, 7]),
        ["upsample_nearest2d"],
    ),
    "upsample by scale": (
        lambda b: b.call(aten.upsample_bilinear2d.default, image(b), [9, 7], False, 1.5, 1.5),
        ["upsample_bilinear2d"],
    ),
    "clone": (lambda b: b.call(aten.clone.default, b.call(aten.relu.default, image(b))), ["relu"]),
    "dropout": (lambda b: b.call(aten.dropout.default, image(b), 0.5, False), []),
    "cast to itself": (lambda b: b.call(aten.to.dtype, image(b), torch.float32), []),
    "cast": (lambda b: b.call(aten.to.dtype, image(b), torch.float64), ["_to_copy"]),
    "zeros_like": (lambda b: b.call(aten.zeros_like.default, image(b)), ["expand"]),
    "masked_fill": (
        lambda b: b.call(
            aten.masked_fill.Scalar, b.input(2, 3), b.input(2, 3, dtype=torch.bool), -1e4
        ),
        ["where"],
    ),
    "where scalar": (
        lambda b: b.call(
            aten.where.ScalarOther, b.input(2, 3, dtype=torch.bool), b.input(2, 3), 2.0
        ),
        ["where"],
    ),
    "add scalar": (lambda b: b.call(aten.add.Scalar, image(b), 2.0, 3.0), ["add"]),
    "add alpha": (lambda b: b.call(aten.add.Tensor, image(b), image(b), alpha=2), ["mul", "add"]),
    "add alpha -1": (lambda b: b.call(aten.add.Tensor, image(b), image(b), alpha=-1), ["sub"]),
    "rsub": (lambda b: b.call(aten.rsub.Scalar, image(b), 1.0), ["neg", "add"]),
    "rsub tensor": (lambda b: b.call(aten.rsub.Tensor, image(b), image(b)), ["sub"]),
    "mul scalar": (lambda b: b.call(aten.mul.Scalar, image(b), 2.0), ["mul"]),
    "div mode": (
        lambda b: b.call(aten.div.Tensor_mode, image(b), image(b), rounding_mode=None),
        ["div"],
    ),
    "square": (lambda b: b.call(aten.square.default, image(b)), ["mul"]),
    "pow": (
        lambda b: b.call(aten.pow.Tensor_Tensor, image(b), b.const(torch.tensor(2.0))),
        ["pow"],
    ),
    "addcmul": (
        lambda b: b.call(aten.addcmul.default, image(b), image(b), image(b), value=0.5),
        ["mul", "mul", "add"],
    ),
    "relu6": (lambda b: b.call(aten.relu6.default, image(b)), ["hardtanh"]),
    "clamp_min": (lambda b: b.call(aten.clamp_min.default, image(b), 0.1), ["clamp"]),
    "clamp tensor": (
        lambda b: b.call(aten.clamp.Tensor, image(b), b.input(5), b.input(5)),
        ["maximum", "minimum"],
    ),
    "max of two": (lambda b: b.call(aten.max.other, image(b), image(b)), ["maximum"]),
    "bitwise_not": (
        lambda b: b.call(aten.bitwise_not.default, b.input(3, dtype=torch.bool)),
        ["logical_not"],
    ),
    "mean": (lambda b: b.call(aten.mean.default, image(b)), ["mean"]),
    "mean dims": (lambda b: b.call(aten.mean.dim, image(b), [-1, 1], True), ["mean"]),
    "sum to a dtype": (
        lambda b: b.call(aten.sum.dim_IntList, image(b), [1], dtype=torch.float64),
        ["_to_copy", "sum"],
    ),
    "max": (lambda b: b.call(aten.max.default, image(b)), ["amax"]),
    "max.dim": (lambda b: b.item(b.call(aten.max.dim, image(b), -1, True), 0), ["amax"]),
    "var": (
        lambda b: b.call(aten.var.correction, image(b), [1, 3], correction=1),
        ["mean", "sub", "mul", "mean", "mul"],
    ),
    "var_mean": (
        lambda b: (lambda v: (b.item(v, 0), b.item(v, 1)))(
            b.call(aten.var_mean.correction, image(b), [1], correction=0, keepdim=True)
        ),
        ["mean", "sub", "mul", "mean"],
    ),
    "softmax": (lambda b: b.call(aten._softmax.default, image(b), -1, False), ["softmax"]),
    "mm": (lambda b: b.call(aten.mm.default, b.input(2, 3), b.input(3, 4)), ["matmul"]),
    "addmm of a transposed": (
        lambda b: b.call(
            aten.addmm.default,
            weight(b, 4),
            b.input(2, 3),
            b.call(aten.t.default, weight(b, 4, 3)),
        ),
        ["linear"],
    ),
    "addmm": (
        lambda b: b.call(
            aten.addmm.default, b.input(4), b.input(2, 3), b.input(3, 4), beta=2, alpha=3
        ),
        ["matmul", "mul", "mul", "add"],
    ),
    "baddbmm": (
        lambda b: b.call(
            aten.baddbmm.default, b.input(2, 1, 4), b.input(2, 5, 3), b.input(2, 3, 4)
        ),
        ["matmul", "add"],
    ),
    "attention": (flash_attention, ["scaled_dot_product_attention"]),
    "conv1d": (
        lambda b: b.call(aten.conv1d.default, b.input(2, 4, 9), weight(b, 3, 4, 3), None, [2], [1]),
        ["convolution"],
    ),
    "conv2d, one image": (
        lambda b: b.call(
            aten.conv2d.default, b.input(4, 6, 5), weight(b, 6, 2, 2, 2), None, [1], [1], [1], 2
        ),
        ["reshape", "convolution", "reshape"],
    ),
    "conv2d same": (
        lambda b: b.call(
            aten.conv2d.padding, image(b), weight(b, 3, 4, 3, 5), None, [1, 1], "same"
        ),
        ["convolution"],
    ),
    "conv2d same, even": (
        lambda b: b.call(
            aten.conv2d.padding, image(b), weight(b, 3, 4, 2, 5), None, [1, 1], "same"
        ),
        ["constant_pad_nd", "convolution"],
    ),
    "conv3d": (
        lambda b: b.call(aten.conv3d.default, b.input(1, 2, 4, 5, 6), weight(b, 3, 2, 2, 2, 2)),
        ["convolution"],
    ),
    "conv_transpose2d": (
        lambda b: b.call(
            aten.conv_transpose2d.input,
            image(b),
            weight(b, 4, 3, 3, 2),
            None,
            [2, 1],
            [1, 0],
            [1, 0],
        ),
        ["convolution"],
    ),
    "batch norm": (
        lambda b: b.item(
            b.call(
                aten._native_batch_norm_legit_no_training.default,
                image(b),
                *norm_arguments(b, 4),
                0.1,
                1e-5,
            ),
            0,
        ),
        ["batch_norm"],
    ),
    "batch norm of the batch": (
        lambda b: b.item(
            b.call(
                aten._native_batch_norm_legit.no_stats,
                image(b),
                *norm_arguments(b, 4)[:2],
                True,
                0.1,
                1e-5,
            ),
            0,
        ),
        ["mean", "sub", "mul", "mean", "add", "sqrt", "div", "reshape", "mul", "reshape", "add"],
    ),
    "layer norm": (
        lambda b: b.item(
            b.call(aten.native_layer_norm.default, image(b), [5], *norm_arguments(b, 5)[:2], 1e-5),
            0,
        ),
        ["layer_norm"],
    ),
    "group norm": (
        lambda b: b.call(aten.group_norm.default, image(b), 2, *norm_arguments(b, 4)[:2]),
        ["reshape", "layer_norm", "reshape", "reshape", "mul", "reshape", "add"],
    ),
    "instance norm": (
        lambda b: b.call(
            aten.instance_norm.default, image(b), None, None, None, None, True, 0.1, 1e-5, False
        ),
        ["reshape", "layer_norm", "reshape"],
    ),
    "max pool with indices": (
        lambda b: b.item(b.call(aten.max_pool2d_with_indices.default, image(b), [3], [2], [1]), 0),
        ["max_pool2d"],
    ),
    "max pool 1d": (
        lambda b: b.call(aten.max_pool1d.default, b.input(2, 3, 9), [3], [2], [1]),
        ["reshape", "max_pool2d", "reshape"],
    ),
    "avg pool 1d": (
        lambda b: b.call(aten.avg_pool1d.default, b.input(2, 3, 9), [3]),
        ["reshape", "avg_pool2d", "reshape"],
    ),
    "max pool 3d": (
        lambda b: b.call(aten.max_pool3d.default, b.input(2, 3, 4, 6, 8), [2]),
        ["max_pool3d"],
    ),
    "max pool 3d with indices, of one sample": (
        lambda b: b.item(
            b.call(aten.max_pool3d_with_indices.default, b.input(3, 5, 6, 7), [3], [2], [1]), 0
        ),
        ["max_pool3d"],
    ),
    "avg pool 3d": (
        lambda b: b.call(aten.avg_pool3d.default, b.input(2, 3, 5, 6, 7), [2, 3, 2], [1, 2, 2]),
        ["avg_pool3d"],
    ),
    "adaptive pool to one": (
        lambda b: b.call(aten.adaptive_avg_pool2d.default, image(b), [1, 1]),
        ["mean"],
    ),
    "adaptive pool": (
        lambda b: b.call(aten._adaptive_avg_pool2d.default, image(b), [3, 1]),
        ["avg_pool2d"],
    ),
    "adaptive pool with equal windows that overlap": (
        lambda b: b.call(aten.adaptive_avg_pool2d.default, b.input(1, 3, 7, 5), [3, 2]),
        ["avg_pool2d"],
    ),
    "shifts": (
        lambda b: b.call(
            aten.__rshift__.Tensor, b.call(aten.__lshift__.Scalar, whole(b), 2), whole(b)
        ),
        ["bitwise_left_shift", "bitwise_right_shift"],
    ),
    "index_add with a factor": (
        lambda b: b.call(
            aten.index_add.default, b.input(3, 4), -1, places(b, 2), b.input(3, 2), alpha=2
        ),
        ["mul", "index_add"],
    ),
    "index_add of neighbours to zeros": (
        lambda b: b.call(
            aten.index_add.default,
            b.const(torch.zeros(2, 3, 4)),
            1,
            b.const(torch.tensor([0, 0, 1, 1, 2, 2])),
            b.input(2, 6, 4),
        ),
        ["reshape", "sum"],
    ),
    "index_add of other neighbours": (
        lambda b: b.call(
            aten.index_add.default,
            b.const(torch.zeros(2)),
            0,
            b.const(torch.tensor([0, 0, 0, 1])),
            b.input(4),
        ),
        ["index_add"],
    ),
    "scatter_add": (
        lambda b: b.call(
            aten.scatter_add.default, b.input(3, 4), -1, places(b, 2, 3), b.input(2, 3)
        ),
        ["scatter_reduce"],
    ),
    "scatter of a number that is multiplied": (
        lambda b: b.call(
            aten.scatter.value_reduce, b.input(3, 4), 1, places(b, 2, 3), 2.5, reduce="multiply"
        ),
        ["expand", "scatter_reduce"],
    ),
    "largest of what is scattered": (
        lambda b: b.call(
            aten.scatter_reduce.two,
            b.input(3, 4),
            1,
            places(b, 2, 3),
            b.input(2, 3),
            "amax",
            include_self=False,
        ),
        ["scatter", "scatter_reduce"],
    ),
    "scatter_add to a scalar": (
        lambda b: b.call(aten.scatter_add.default, b.input(), 0, places(b), b.input()),
        ["reshape", "reshape", "reshape", "scatter_reduce", "reshape"],
    ),
    "gather from a scalar": (
        lambda b: b.call(aten.gather.default, b.input(), 0, places(b, 1)),
        ["expand"],
    ),
    "mean of what is scattered": (
        lambda b: b.call(
            aten.scatter_reduce.two, b.input(3, 4), 1, places(b, 2, 3), b.input(2, 3), "mean"
        ),
        ["scatter_reduce", "expand", "expand", "scatter_reduce", "div"],
    ),
    "adding to places of two dimensions": (
        lambda b: b.call(
            aten.index_put.default,
            b.input(3, 4, 5),
            [None, places(b, 2, 1), places(b, 2)],
            b.input(2, 2),
            True,
        ),
        [
            *["lt", "add", "where", "mul", "lt", "add", "where", "add", "expand", "reshape"],
            *["expand", "reshape", "reshape", "index_add", "reshape"],
        ],
    ),
    "embedding": (
        lambda b: b.call(aten.embedding.default, weight(b, 5, 3), b.input(2, 4, dtype=I64), 0),
        ["embedding"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    build, expected = CASES[name]
    b = Build()
    made = build(b)
    gm = b.done(*(made if isinstance(made, tuple) else (made,)))
    run(gm, Canonicalize())
    assert [op for op in ops(gm) if op != "permute" or "permute" in expected] == expected


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding", "stride"),
    [
        ([3, 3], [1, 1], [1, 1], [2, 2]),
        ([2, 3], [2, 1], [0, 1], [1, 3]),
        ([1, 2], [1, 3], [0, 0], [3, 2]),
        ([4, 1], [1, 1], [2, 0], [2, 1]),
    ],
)
def test_overlapping_windows_are_added_up(
    kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]
) -> None:
    size = [7, 8]
    counts = [
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]
    b = Build()
    x = b.input(2, 3 * kernel[0] * kernel[1], counts[0] * counts[1])
    gm = b.done(b.call(aten.col2im.default, x, size, kernel, dilation, padding, stride))
    run(gm, Canonicalize())  # Also holds the outputs against those of before.
    assert "col2im" not in ops(gm)


def test_in_place_ops_become_functional() -> None:
    b = Build()
    x = b.call(aten.neg.default, b.input(2, 3))
    gm = b.done(b.call(aten.silu_.default, b.call(aten.relu_.default, x)))
    run(gm, Canonicalize())
    assert ops(gm) == ["neg", "relu", "silu"]


def test_in_place_on_a_value_read_elsewhere_is_refused() -> None:
    b = Build()
    x = b.call(aten.neg.default, b.input(2, 3))
    gm = b.done(b.call(aten.relu_.default, x), x)
    gm.meta["passes"] = ()
    result = run_passes(gm, [Canonicalize()])[0]
    assert {note.what: note.reason for note in result.notes} == {
        "canonicalize relu_": "it overwrites neg_default, which is read elsewhere"
    }
    assert ops(gm) == ["neg", "relu_"]


REFUSED: dict[str, tuple[Callable[[Build], Made], str]] = {
    "dropout.default": (
        lambda b: b.call(aten.dropout.default, image(b), 0.0, True),
        "dropout in training mode",
    ),
    "batch_norm.default": (
        lambda b: b.call(
            aten.batch_norm.default, image(b), *norm_arguments(b, 4), True, 0.1, 1e-5, False
        ),
        "batch normalization in training mode: it changes its running statistics",
    ),
    "pad.default": (
        lambda b: b.call(aten.pad.default, b.input(3, 4, 5), [1, 1], "replicate"),
        "padding mode replicate",
    ),
    "div.Tensor_mode": (
        lambda b: b.call(aten.div.Tensor_mode, image(b), image(b), rounding_mode="floor"),
        "division rounding to floor",
    ),
    "bitwise_not.default": (
        lambda b: b.call(aten.bitwise_not.default, b.input(3, dtype=torch.int32)),
        "bitwise arithmetic on integers",
    ),
    "max.dim": (
        lambda b: b.item(b.call(aten.max.dim, image(b), 1), 1),
        "result 1 is used, which has no canonical form",
    ),
    "index.Tensor": (
        lambda b: b.call(aten.index.Tensor, image(b), [b.input(2, dtype=I64)]),
        "indices that are not constant integers",
    ),
    "index.Tensor, two vectors": (
        lambda b: b.call(
            aten.index.Tensor,
            image(b),
            [b.const(torch.tensor([0, 1])), b.const(torch.tensor([2, 0]))],
        ),
        "indexing by several tensors that vary together",
    ),
    "adaptive_avg_pool2d.default": (
        lambda b: b.call(aten.adaptive_avg_pool2d.default, image(b), [4, 1]),
        "adaptive pooling from [6, 5] to [4, 1]: windows differ",
    ),
    "index_put.default": (
        lambda b: b.call(
            aten.index_put.default, b.input(3, 3, 3), [places(b, 2), None, places(b, 2)], b.input(1)
        ),
        "places given by tensors for dimensions that are no neighbours",
    ),
    "index_put.default, truth values": (
        lambda b: b.call(
            aten.index_put.default,
            b.input(3),
            [b.const(torch.tensor([True, False, True]))],
            b.input(1),
        ),
        "places that are not integers",
    ),
    "var.correction": (
        lambda b: b.call(aten.var.correction, b.input(1, 3), [0]),
        "the variance of 1 values with correction None",
    ),
    "mean.default": (lambda b: b.call(aten.mean.default, b.input()), "reduction of a scalar"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:.*degrees of freedom.*")
def test_refusals(name: str) -> None:
    build, reason = REFUSED[name]
    b = Build()
    made = build(b)
    assert isinstance(made, fx.Node)
    gm = b.done(made)
    before = ops(gm)
    result = run(gm, Canonicalize())
    assert refusals(result) == {f"canonicalize {name.split(',')[0]}": reason}
    assert ops(gm) == before


def test_unknown_ops_stay_as_they_are() -> None:
    b = Build()
    both = b.call(aten.topk.default, b.input(2, 5), 2)
    gm = b.done(b.item(both, 0), b.item(both, 1))
    result = run(gm, Canonicalize())
    assert ops(gm) == ["topk", "getitem", "getitem"]
    assert set(changes(result)) == {"spell out arguments"}


def test_arguments_are_spelled_out() -> None:
    b = Build()
    x = image(b)
    pooled = b.call(aten.max_pool2d.default, x, [2], ceil_mode=True)
    gm = b.done(b.call(aten.sum.dim_IntList, pooled, [1], dtype=None))
    run(gm, Canonicalize())
    pool, total = (n for n in gm.graph.nodes if n.op == "call_function")
    assert pool.args == (x, [2, 2], [2, 2], [0, 0], [1, 1], True)
    assert (pool.kwargs, total.args[1:], total.kwargs) == ({}, ([1], False), {})


def test_origins_are_carried_along() -> None:
    b = Build()
    x = b.call(aten.select.int, image(b), 1, 0)
    gm = b.done(x)
    where = g.origin(x)
    run_passes(gm, [Canonicalize()], Context())
    assert all(g.origin(n) == where for n in gm.graph.nodes if n.op == "call_function")


def test_the_table_holds_operators_only() -> None:
    assert all(isinstance(target, torch._ops.OpOverload) for target in TABLE)
