"""Convolutions that are worth moving tensors into blocks for."""

from __future__ import annotations

import pytest
from torch import fx

from graphopt.backends.kernels.conv_layout import wants_blocks
from graphopt.backends.target import get_target
from graphopt.program.layouts import InBlocks
from tests.backends.harness import Builder, aten, check, origins

NOTHING, READS, BOTH = InBlocks(), InBlocks(reads=True), InBlocks(reads=True, makes=True)
MAKES = InBlocks(makes=True)


def _wanted(
    target: str, size: tuple[int, ...], channels: int, kernel: tuple[int, ...], *,
    stride: int = 1, groups: int = 1, winograd: bool = True, strassen: bool = True,
) -> InBlocks:  # fmt: skip
    b = Builder()
    y = b.conv(b.input(b.random(1, *size)), channels, kernel, stride=stride, groups=groups)
    b.returns(y)
    return wants_blocks(b.finish(), y, get_target(target), winograd=winograd, strassen=strassen)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "rpi4"])
def test_what_pays(target: str) -> None:
    image, line = (64, 28, 28), (128, 400)
    assert _wanted(target, image, 64, (3, 3)) == BOTH
    assert _wanted(target, (64, 56, 56), 128, (3, 3), stride=2) == BOTH
    assert _wanted(target, image, 128, (3, 3), groups=2) == BOTH
    assert _wanted(target, image, 60, (3, 3)) == BOTH
    assert _wanted(target, line, 128, (3,)) == BOTH
    assert _wanted(target, (98, 28, 28), 96, (3, 3)) == MAKES, "a block of the input is not whole"
    assert _wanted(target, (64, 5, 28, 28), 64, (1, 3, 3)) == BOTH
    assert _wanted(target, (768, 128), 768, (1,)) == READS
    assert _wanted(target, (384, 16, 16), 1152, (1, 1)) == READS


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "rpi4"])
def test_what_does_not(target: str) -> None:
    image = (64, 28, 28)
    assert _wanted(target, (8, 28, 28), 8, (3, 3)) == NOTHING, "moving it takes longer"
    assert _wanted(target, image, 64, (1, 1)) == NOTHING, "too small for Strassen's products"
    assert _wanted(target, (386, 16, 16), 1152, (1, 1)) == NOTHING, "a block is not whole"
    assert _wanted(target, image, 1, (1, 1)) == NOTHING
    assert _wanted(target, image, 64, (3, 3), winograd=False) == NOTHING
    assert _wanted(target, (768, 128), 768, (1,), strassen=False) == NOTHING
    assert _wanted(target, image, 64, (3, 3), groups=64) == NOTHING, "depthwise"


def test_other_operators_want_nothing() -> None:
    b = Builder()
    x = b.input(b.random(1, 64, 28, 28))
    changing = b.op(aten.relu.default, b.input(b.random(64, 64, 3, 3)))
    pooled = b.op(aten.max_pool2d.default, x, [2, 2])
    y = b.op(aten.convolution.default, x, changing, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    b.returns(pooled, y)
    gm, target = b.finish(), get_target("host")
    for node in (pooled, y):
        assert wants_blocks(gm, node, target, winograd=True, strassen=True) == NOTHING


def _between_plain(b: Builder, x: fx.Node, channels: int, kernel: int, stride: int) -> None:
    """A convolution of a transposed image, transposed."""
    moved = b.op(aten.permute.default, x, [0, 1, 3, 2])
    padding = kernel // 2
    y = b.conv(moved, channels, (kernel, kernel), stride=stride, padding=padding)
    b.returns(b.op(aten.permute.default, b.op(aten.relu.default, y), [0, 2, 3, 1]))


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "way"),
    [(96, 3, 1, "winograd"), (128, 3, 2, "winograd"), (384, 1, 1, "strassen")],
)
def test_between_plain_tensors(channels: int, kernel: int, stride: int, way: str) -> None:
    b = Builder(1)
    _between_plain(b, b.input(b.random(2, channels, 29, 26)), channels, kernel, stride)
    assert way in origins(check(b, tolerance=4e-6))


def test_gates_of_plain_tensors() -> None:
    """As in a recurrent cell of images whose parts, joined, are no whole blocks: the reset gate's
    product with the state is joined to the inputs again."""
    b = Builder(3)
    state, x = b.input(b.random(1, 64, 19, 22)), b.input(b.random(1, 34, 19, 22))
    joined = b.op(aten.cat.default, [state, x], 1)
    gate = b.op(aten.sigmoid.default, b.conv(joined, 64, (3, 3), padding=1))
    kept = b.op(aten.mul.Tensor, gate, state)
    y = b.conv(b.op(aten.cat.default, [kept, x], 1), 64, (3, 3), padding=1)
    b.returns(b.op(aten.tanh.default, y))
    assert origins(check(b, tolerance=8e-6)).count("winograd") == 2


def test_sums_over_branches() -> None:
    """As in selective kernels: five dimensions before and after, which are plain."""
    b = Builder(1)
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 9, 11)), 64, (1, 1)))
    whole = b.op(aten.sum.dim_IntList, b.op(aten.reshape.default, x, [2, 2, 32, 9, 11]), [1])
    y = b.op(aten.silu.default, b.conv(whole, 64, (3, 3), padding=1))
    again = b.op(aten.reshape.default, y, [2, 2, 32, 9, 11])
    b.returns(b.op(aten.sum.dim_IntList, again, [1]))
    assert "winograd" in origins(check(b, tolerance=4e-6))


def test_outputs_are_made_in_blocks_and_copied() -> None:
    """As those of a feature pyramid: the caller's memory is plain, the fast kernels' is not."""
    b = Builder(2)
    x = b.input(b.random(2, 64, 17, 15))
    smooth = b.op(aten.relu.default, b.conv(x, 64, (3, 3), padding=1))
    apart = b.conv(b.conv(x, 24, (1, 1)), 24, (3, 3), groups=24)
    once = b.conv(x, 5, (1, 1))
    b.returns(smooth, apart, once)
    program = check(b, tolerance=4e-6)
    assert {"winograd", "depthwise"} <= set(origins(program))
    # `once` is written to the caller's memory as it is computed.
    assert origins(program).count("map") == 2


@pytest.mark.parametrize("channels", [1, 3, 13])
def test_outputs_of_few_channels(channels: int) -> None:
    """As images made of images: most of a block's vectors is empty, and Winograd's still pays."""
    b = Builder(channels)
    x = b.conv(b.input(b.random(1, 3, 66, 62)), 64, (1, 1))
    b.returns(b.op(aten.tanh.default, b.conv(b.op(aten.relu.default, x), channels, (3, 3))))
    assert "winograd" in origins(check(b, tolerance=8e-6))
