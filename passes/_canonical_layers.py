"""Canonical forms of convolution, normalization, pooling and resizing, for `canonicalize`."""

from __future__ import annotations

import math
from typing import Any

from torch import fx

from graphopt.graph import shape
from graphopt.passes._canonical import Handler, Outcome, filled, per_channel
from graphopt.passes._nodes import aten, rank
from graphopt.passes.rewrite import Editor, Refusal
from graphopt.windows import even_windows

Arguments = dict[str, Any]


def _convolution(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """conv1d … conv_transpose3d, _convolution → convolution, batched, with one number per axis."""
    x, weight = a["input"], a["weight"]
    dims = rank(weight) - 2
    transposed = a.get("transposed", "output_padding" in a)
    stride, dilation = filled(a["stride"], dims), filled(a["dilation"], dims)
    output_padding = filled(a.get("output_padding", 0), dims)
    extra: list[int] = []
    if isinstance(a["padding"], str):
        padding, extra = _named_padding(a["padding"], shape(weight)[2:], dilation)
    else:
        padding = filled(a["padding"], dims)
    rest = [stride, padding, dilation, transposed, output_padding, a["groups"]]
    batched = rank(x) == dims + 2
    if node.target is aten.convolution.default and batched and list(node.args[3:]) == rest:
        return None
    if not batched:
        x = ed.call(aten.reshape.default, x, [1, *shape(x)])
    if any(extra):
        # One more at the end than at the start, which convolution itself has no way to say.
        after = [n for size in reversed(extra) for n in (0, size)]
        x = ed.call(aten.constant_pad_nd.default, x, after, 0.0)
    new = ed.call(aten.convolution.default, x, weight, a["bias"], *rest)
    return new if batched else ed.call(aten.reshape.default, new, list(shape(node)))


def _named_padding(
    name: str, kernel: tuple[int, ...], dilation: list[int]
) -> tuple[list[int], list[int]]:
    """Padding on both sides, and what "same" adds at the end for even kernels."""
    if name == "valid":
        return [0] * len(kernel), [0] * len(kernel)
    totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return [total // 2 for total in totals], [total % 2 for total in totals]


def _batch_norm(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    mean, var = a.get("running_mean"), a.get("running_var")
    is_single = node.target is aten.batch_norm.default
    if mean is None or var is None:
        norm = _normalized_batch(ed, a)
        return norm if is_single else [norm, None, None]
    if a.get("training"):
        return Refusal("batch normalization in training mode: it changes its running statistics")
    if is_single and not a["cudnn_enabled"]:
        return None
    norm = ed.call(
        aten.batch_norm.default,
        *(a["input"], a["weight"], a["bias"], mean, var, False, a["momentum"], a["eps"], False),
    )
    return norm if is_single else [norm, None, None]


def _normalized_batch(ed: Editor, a: Arguments) -> fx.Node:
    """x less its mean, over the root of its variance, per channel of the whole batch.

    So layers with standardized weights normalize them in each run (Qiao et al., "Micro-Batch
    Training with Batch-Channel Normalization and Weight Standardization", 2019).
    """
    x = a["input"]
    axes = [axis for axis in range(rank(x)) if axis != 1]
    centred = ed.call(aten.sub.Tensor, x, ed.call(aten.mean.dim, x, axes, True))
    variance = ed.call(aten.mean.dim, ed.call(aten.mul.Tensor, centred, centred), axes, True)
    deviation = ed.call(aten.sqrt.default, ed.call(aten.add.Tensor, variance, a["eps"]))
    return _scaled(ed, ed.call(aten.div.Tensor, centred, deviation), a)


def _scaled(ed: Editor, out: fx.Node, a: Arguments) -> fx.Node:
    """What a normalization's weight and bias, if it has them, make of each channel."""
    if a["weight"] is not None:
        out = ed.call(aten.mul.Tensor, out, per_channel(ed, a["weight"], rank(out)))
    if a["bias"] is not None:
        out = ed.call(aten.add.Tensor, out, per_channel(ed, a["bias"], rank(out)))
    return out


def _native_layer_norm(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    norm = ed.call(aten.layer_norm.default, *a.values(), True)
    return [norm, None, None]


def _normalized_groups(ed: Editor, node: fx.Node, x: fx.Node, groups: int, a: Arguments) -> fx.Node:
    """reshape → layer_norm over each group of channels → reshape → scale and shift."""
    n = shape(x)[0]
    apart = ed.call(aten.reshape.default, x, [n, groups, math.prod(shape(x)[1:]) // groups])
    norm = ed.call(aten.layer_norm.default, apart, [shape(apart)[2]], None, None, a["eps"], True)
    return _scaled(ed, ed.call(aten.reshape.default, norm, list(shape(x))), a)


def _group_norm(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    if "num_groups" in a:
        return _normalized_groups(ed, node, a["input"], a["num_groups"], a)
    return [_normalized_groups(ed, node, a["input"], a["group"], a), None, None]


def _instance_norm(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x = a["input"]
    if not a["use_input_stats"]:
        rest = (a["running_mean"], a["running_var"], False, a["momentum"], a["eps"], False)
        return ed.call(aten.batch_norm.default, x, a["weight"], a["bias"], *rest)
    return _normalized_groups(ed, node, x, shape(x)[1], a)


def _pool_arguments(a: Arguments, dims: int) -> tuple[list[int], list[int], list[int]]:
    kernel = filled(a["kernel_size"], dims)
    stride = filled(a["stride"], dims) if a["stride"] else kernel
    return kernel, stride, filled(a["padding"], dims)


def _max_pool(dims: int) -> Handler:
    pool = (aten.max_pool2d.default, aten.max_pool3d.default)[dims - 2]

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        rest = [*_pool_arguments(a, dims), filled(a["dilation"], dims), a["ceil_mode"]]
        if node.target is pool:
            if list(node.args[1:]) == rest:
                return None
            return ed.call(pool, a["self"], *rest)
        return [ed.call(pool, a["self"], *rest), None]

    return handle


def _avg_pool(dims: int) -> Handler:
    pool = (aten.avg_pool2d.default, aten.avg_pool3d.default)[dims - 2]

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        counted = [a["ceil_mode"], a["count_include_pad"], a["divisor_override"]]
        rest = [*_pool_arguments(a, dims), *counted]
        if list(node.args[1:]) == rest:
            return None
        return ed.call(pool, a["self"], *rest)

    return handle


def _pool_1d(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """max_pool1d, avg_pool1d → the same in 2-D with a height of 1."""
    x = a["self"]
    (kernel,), (stride,), (padding,) = _pool_arguments(a, 1)
    tall = ed.call(aten.reshape.default, x, [*shape(x)[:-1], 1, shape(x)[-1]])
    first = [[1, kernel], [1, stride], [0, padding]]
    if node.target is aten.avg_pool1d.default:
        rest = [a["ceil_mode"], a["count_include_pad"], None]
        pooled = ed.call(aten.avg_pool2d.default, tall, *first, *rest)
    else:
        (dilation,) = filled(a["dilation"], 1)
        rest = [[1, dilation], a["ceil_mode"]]
        pooled = ed.call(aten.max_pool2d.default, tall, *first, *rest)
    return ed.call(aten.reshape.default, pooled, list(shape(node)))


def _adaptive_avg_pool(dims: int) -> Handler:
    """adaptive_avg_pool → mean where the output is one pixel, avg_pool2d for equal windows."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        x = a["self"]
        sizes, outs = shape(x)[-dims:], shape(node)[-dims:]
        if all(out == 1 for out in outs):
            axes = list(range(rank(x) - dims, rank(x)))
            return ed.call(aten.mean.dim, x, axes, True)
        windows = [even_windows(size, out) for size, out in zip(sizes, outs, strict=True)]
        if None in windows:
            return Refusal(f"adaptive pooling from {list(sizes)} to {list(outs)}: windows differ")
        kernel, stride = (list(part) for part in zip(*filter(None, windows), strict=True))
        if dims == 1:
            kernel, stride = [1, *kernel], [1, *stride]
            x = ed.call(aten.reshape.default, x, [*shape(x)[:-1], 1, shape(x)[-1]])
        pooled = ed.call(aten.avg_pool2d.default, x, kernel, stride, [0, 0], False, True, None)
        return pooled if dims == 2 else ed.call(aten.reshape.default, pooled, list(shape(node)))

    return handle


def _embedding(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    # The padding row only matters for gradients.
    if (a["padding_idx"], a["scale_grad_by_freq"], a["sparse"]) == (-1, False, False):
        return None
    return ed.call(aten.embedding.default, a["weight"], a["indices"], -1, False, False)


def _pixel_shuffle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x, r = a["self"], a["upscale_factor"]
    if rank(x) != 4:
        return Refusal("pixel_shuffle of a tensor that is not 4-D")
    n, c, h, w = shape(x)
    apart = ed.call(aten.reshape.default, x, [n, c // (r * r), r, r, h, w])
    moved = ed.call(aten.permute.default, apart, [0, 1, 4, 2, 5, 3])
    return ed.call(aten.reshape.default, moved, list(shape(node)))


def _pixel_unshuffle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x, r = a["self"], a["downscale_factor"]
    if rank(x) != 4:
        return Refusal("pixel_unshuffle of a tensor that is not 4-D")
    n, c, h, w = shape(x)
    apart = ed.call(aten.reshape.default, x, [n, c, h // r, r, w // r, r])
    moved = ed.call(aten.permute.default, apart, [0, 1, 3, 5, 2, 4])
    return ed.call(aten.reshape.default, moved, list(shape(node)))


def _channel_shuffle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    x, groups = a["self"], a["groups"]
    n, c, *rest = shape(x)
    apart = ed.call(aten.reshape.default, x, [n, groups, c // groups, math.prod(rest)])
    moved = ed.call(aten.permute.default, apart, [0, 2, 1, 3])
    return ed.call(aten.reshape.default, moved, list(shape(node)))


def _upsample(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """upsample_*.default → .vec, which takes either sizes or scales."""
    x, scales = a["self"], [a["scales_h"], a["scales_w"]]
    size: list[int] | None = list(a["output_size"])
    if any(scales) and not all(scales):
        return Refusal("a scale for one of two dimensions")
    if all(scales):
        made = [int(n * s) for n, s in zip(shape(x)[2:], scales, strict=True)]
        if made != size:
            return Refusal(f"scales {scales} that do not give the size {size}")
        size = None
    given = scales if size is None else None
    if node.target is aten.upsample_nearest2d.default:
        return ed.call(aten.upsample_nearest2d.vec, x, size, given)
    return ed.call(aten.upsample_bilinear2d.vec, x, size, a["align_corners"], given)


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(
        [
            aten.convolution.default,
            aten._convolution.default,
            aten.conv1d.default,
            aten.conv1d.padding,
            aten.conv2d.default,
            aten.conv2d.padding,
            aten.conv3d.default,
            aten.conv3d.padding,
            aten.conv_transpose1d.default,
            aten.conv_transpose2d.input,
            aten.conv_transpose3d.input,
        ],
        _convolution,
    ),
    **dict.fromkeys(
        [
            aten.batch_norm.default,
            aten._native_batch_norm_legit_no_training.default,
            aten._native_batch_norm_legit.default,
            aten._native_batch_norm_legit.no_stats,
            aten.native_batch_norm.default,
        ],
        _batch_norm,
    ),
    aten.native_layer_norm.default: _native_layer_norm,
    aten.group_norm.default: _group_norm,
    aten.native_group_norm.default: _group_norm,
    aten.instance_norm.default: _instance_norm,
    aten.max_pool2d.default: _max_pool(2),
    aten.max_pool2d_with_indices.default: _max_pool(2),
    aten.avg_pool2d.default: _avg_pool(2),
    aten.max_pool3d.default: _max_pool(3),
    aten.max_pool3d_with_indices.default: _max_pool(3),
    aten.avg_pool3d.default: _avg_pool(3),
    aten.max_pool1d.default: _pool_1d,
    aten.avg_pool1d.default: _pool_1d,
    aten.adaptive_avg_pool1d.default: _adaptive_avg_pool(1),
    aten.adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    aten._adaptive_avg_pool2d.default: _adaptive_avg_pool(2),
    aten.embedding.default: _embedding,
    aten.pixel_shuffle.default: _pixel_shuffle,
    aten.pixel_unshuffle.default: _pixel_unshuffle,
    aten.channel_shuffle.default: _channel_shuffle,
    aten.native_channel_shuffle.default: _channel_shuffle,
    aten.upsample_nearest2d.default: _upsample,
    aten.upsample_bilinear2d.default: _upsample,
}
