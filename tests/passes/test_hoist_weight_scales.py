"""hoist_weight_scales: a convolution by scaled constants scales what it reads and makes instead."""

from __future__ import annotations

import pytest
import torch
from pass_graphs import Build, aten, ops, run
from test_fold_batch_norm import draw
from torch import fx

from graphopt.passes.hoist_weight_scales import HoistWeightScales


def modulated(
    b: Build, images: int, *, kernel: int = 3, outputs: int = 6, demodulated: bool = True,
    weight: torch.Tensor | None = None,
) -> fx.Node:  # fmt: skip
    """StyleGAN2's convolution, as exporters write it."""
    constant = draw(1, outputs, 4, kernel, kernel) if weight is None else weight
    style = b.input(images, 1, 4, 1, 1)
    w = b.call(aten.mul.Tensor, b.const(constant), style)
    if demodulated:
        w = b.call(aten.mul.Tensor, w, b.input(images, outputs, 1, 1, 1))
    w = b.call(aten.reshape.default, w, [images * outputs, 4, kernel, kernel])
    x = b.input(1, images * 4, 5, 7)
    bias = b.const(draw(images * outputs))
    pad = kernel // 2
    return b.call(
        aten.convolution.default, x, w, bias, [1, 1], [pad, pad], [1, 1], False, [0, 0], images
    )


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("demodulated", [True, False])
def test_modulation(images: int, kernel: int, demodulated: bool) -> None:
    b = Build()
    gm = b.done(modulated(b, images, kernel=kernel, demodulated=demodulated))
    run(gm, HoistWeightScales())
    (conv,) = (node for node in gm.graph.nodes if node.target is aten.convolution.default)
    assert conv.args[1].op == "get_attr"
    assert conv.args[-1] == 1
    assert conv.meta["val"].shape[0] == images


def test_scales_of_a_plain_weight() -> None:
    """Of a batch; a number, and one scale for all."""
    b = Build()
    x, one = b.input(2, 4, 5, 5), b.input(1)
    w = b.call(aten.mul.Tensor, b.call(aten.mul.Tensor, b.const(draw(6, 4, 3, 3)), 0.5), one)
    gm = b.done(b.call(
        aten.convolution.default, x, w, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1
    ))  # fmt: skip
    run(gm, HoistWeightScales())
    assert ops(gm).count("convolution") == 1
    (conv,) = (node for node in gm.graph.nodes if node.target is aten.convolution.default)
    assert conv.args[1].op == "get_attr"


@pytest.mark.parametrize("case", ["not constant", "full scale", "added", "one of each image"])
def test_what_stays(case: str) -> None:
    b = Build()
    if case == "one of each image":
        gm = b.done(modulated(b, 2, weight=draw(2, 6, 4, 3, 3)))
    else:
        other = b.input(6, 1, 1, 1) if case != "full scale" else b.input(6, 4, 1, 1)
        w = b.input(6, 4, 3, 3) if case == "not constant" else b.const(draw(6, 4, 3, 3))
        w = b.call(aten.add.Tensor if case == "added" else aten.mul.Tensor, w, other)
        gm = b.done(b.call(
            aten.convolution.default, b.input(2, 4, 5, 5), w, None, [1, 1], [1, 1], [1, 1], False,
            [0, 0], 1,
        ))  # fmt: skip
    before = ops(gm)
    assert not run(gm, HoistWeightScales()).changed
    assert ops(gm) == before
