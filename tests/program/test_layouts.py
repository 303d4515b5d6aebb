"""Which tensors are kept in blocks of channels."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.target import get_target
from graphopt.program.layouts import assign_layouts
from tests.backends.harness import Builder, aten, check, compile_and_run, origins

BLOCK = 8
BLOCKED = "NCHW8c"


def layouts(b: Builder) -> dict[str, str]:
    gm = b.finish()
    return {node.name: layout for node, layout in assign_layouts(gm, BLOCK).items()}


def test_blocks_between_convolutions_and_plain_at_the_borders() -> None:
    b = Builder()
    x = b.input(b.random(1, 3, 8, 8))
    first = b.conv(x, 16, (3, 3))
    middle = b.op(aten.relu.default, first)
    last = b.conv(middle, 16, (3, 3))
    b.returns(last)
    found = layouts(b)
    assert [found[n.name] for n in (x, first, middle, last)] == ["plain", BLOCKED, BLOCKED, "plain"]


def test_what_keeps_blocks() -> None:
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 8, 8)), 16, (1, 1))
    keeping = [
        b.op(aten.max_pool2d.default, x, [2, 2]),
        b.op(aten.mean.dim, x, [2, 3], True),
        b.op(aten.constant_pad_nd.default, x, [1, 1, 1, 1]),
        b.op(aten.slice.Tensor, x, 1, 8, 16),
        b.op(aten.slice.Tensor, x, 2, 1, 5),
        b.op(aten.cat.default, [x, x], 1),
        b.op(aten.mul.Tensor, x, b.constant(b.random(16, 1, 1))),
        b.op(aten.index_select.default, x, 3, b.constant(torch.tensor([1, 0, 1, 2, 6]))),
    ]
    losing = [
        b.op(aten.index_select.default, x, 1, b.constant(torch.tensor([1, 0]))),
        b.op(aten.slice.Tensor, x, 1, 4, 12),
        b.op(aten.permute.default, x, [0, 1, 3, 2]),
        b.op(aten.reshape.default, x, [1, 16, 4, 16]),
        b.op(aten.softmax.int, x, 1),
        b.op(aten.gt.Scalar, x, 0),
        b.op(aten.constant_pad_nd.default, x, [0, 0, 0, 0, 0, 1]),
    ]
    for node in (*keeping, *losing):
        is_float = G.value(node).dtype == torch.float32
        b.returns(b.conv(node, 4, (1, 1)) if is_float else node)
    found = layouts(b)
    assert {n.name for n in keeping if found[n.name] != BLOCKED} == set()
    assert {n.name for n in losing if found[n.name] != "plain"} == set()


def test_padding_channels_are_never_read_past_a_buffer() -> None:
    """10 channels: an operand with a value per pixel of each has nothing behind the last one."""
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 4, 4)), 10, (1, 1))
    safe = b.op(aten.mul.Tensor, x, b.constant(b.random(1, 10, 1, 1)))
    single = b.op(aten.add.Tensor, x, b.input(b.random(1, 1, 4, 4)))
    past = b.op(aten.add.Tensor, x, b.input(b.random(1, 10, 4, 4)))
    b.returns(*(b.conv(node, 4, (1, 1)) for node in (safe, single, past)))
    found = layouts(b)
    assert [found[n.name] for n in (safe, single, past)] == [BLOCKED, BLOCKED, "plain"]


def test_of_one_pixel_only_results_have_memory_behind_them() -> None:
    """What follows them in the arena is read where there are no channels, and used nowhere."""
    b = Builder()
    x = b.conv(b.input(b.random(2, 3, 4, 4)), 10, (1, 1))
    given = b.op(aten.reshape.default, b.input(b.random(2, 10)), [2, 10, 1, 1])
    made = b.op(aten.reshape.default, b.op(aten.neg.default, b.input(b.random(2, 10))),
                [2, 10, 1, 1])  # fmt: skip
    past, safe = (b.op(aten.mul.Tensor, x, operand) for operand in (given, made))
    b.returns(*(b.conv(node, 4, (1, 1)) for node in (past, safe)))
    found = layouts(b)
    assert [found[n.name] for n in (past, safe)] == ["plain", BLOCKED]


def test_reflected_borders() -> None:
    """Padding by reflection picks rows and columns, of blocks with channels that are not there."""
    b = Builder(4)
    x = b.conv(b.input(b.random(2, 3, 5, 6)), 11, (1, 1))
    for axis, extent in ((2, 5), (3, 6)):
        places = [2, 1, *range(extent), extent - 2]
        x = b.op(aten.index_select.default, x, axis, b.constant(torch.tensor(places)))
    b.returns(b.conv(x, 4, (3, 3)))
    program = check(b)
    blocked = f"NCHW{get_target('host').isa.block}c"
    assert [program.buffers[step.writes[0]].layout for step in program.steps][:2] == [blocked] * 2


def test_plain_at_once_where_no_reader_wants_blocks() -> None:
    b = Builder()
    x = b.op(aten.relu.default, b.conv(b.input(b.random(1, 3, 4, 4)), 16, (1, 1)))
    b.returns(b.op(aten.reshape.default, x, [16, 16]))
    found = layouts(b)
    assert set(found.values()) == {"plain"}


def test_what_is_moved_before_a_depthwise_convolution_becomes_blocks() -> None:
    """Slices and concatenations of plain tensors are copied once; no depthwise kernel reads them
    plain."""
    b = Builder()
    x = b.input(b.random(1, 32, 6, 6))
    moved = [
        b.op(aten.slice.Tensor, x, 1, 3, 15),
        b.op(aten.cat.default, [x, x], 1),
        b.op(aten.permute.default, x, [0, 1, 3, 2]),
        b.op(aten.constant_pad_nd.default, x, [1, 1, 1, 1]),
    ]
    for node in moved:
        channels = G.shape(node)[1]
        b.returns(b.conv(node, channels, (3, 3), groups=channels))
    plain = b.op(aten.slice.Tensor, x, 1, 3, 16)
    b.returns(b.conv(plain, 4, (1, 1)))
    found = layouts(b)
    assert {found[node.name] for node in moved} == {BLOCKED}
    assert found[plain.name] == "plain"


def test_moved_before_a_depthwise_convolution() -> None:
    b = Builder(3)
    x = b.input(b.random(2, 32, 6, 7))
    for node in (
        b.op(aten.slice.Tensor, x, 1, 3, 15),
        b.op(aten.cat.default, [x, b.op(aten.slice.Tensor, x, 1, 0, 5)], 1),
        b.op(aten.constant_pad_nd.default, x, [1, 2, 0, 1]),
    ):
        channels = G.shape(node)[1]
        y = b.conv(node, channels, (3, 3), groups=channels, padding=1)
        b.returns(b.conv(y, 4, (1, 1)))
    assert origins(check(b)).count("depthwise") == 3


def test_tokens_that_become_images_are_blocks() -> None:
    """Transformers' decoders: tokens, as images, upsampled, concatenated and convolved."""
    b = Builder(3)

    def image(size: int) -> fx.Node:
        tokens = b.input(b.random(1, size * size, 16))
        turned = b.op(aten.permute.default, tokens, [0, 2, 1])
        return b.op(aten.reshape.default, turned, [1, 16, size, size])

    parts = [image(6), b.op(aten.upsample_bilinear2d.vec, image(3), [6, 6], False, None)]
    both = b.op(aten.cat.default, parts, 1)
    # Nobody convolves this one, and of this the rows are not channels.
    alone = b.op(aten.relu.default, image(4))
    rows = b.op(aten.permute.default, b.input(b.random(1, 3, 16, 5)), [0, 2, 1, 3])
    b.returns(b.conv(both, 4, (1, 1)), alone, b.conv(rows, 4, (1, 1)))
    gm = b.finish()
    found = assign_layouts(gm, BLOCK)
    assert [found[node] for node in (*parts, both)] == [BLOCKED] * 3
    assert [found[node] for node in (alone, rows)] == ["plain"] * 2
    program, actual = compile_and_run(gm, b.inputs)
    for ours, theirs in zip(actual, gm(*b.inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=4e-6)
    assert "cat" not in {op for step in program.steps for op in step.ops}


def _selective(b: Builder, channels: int) -> tuple[fx.Node, fx.Node, fx.Node]:
    """A sum over branches, the convolution of it, and a view of that in groups of channels."""
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 9, 11)), 2 * channels, (1, 1)))
    branches = b.op(aten.reshape.default, x, [2, 2, channels, 9, 11])
    whole = b.op(aten.sum.dim_IntList, branches, [1])
    y = b.op(aten.silu.default, b.conv(whole, 2 * channels, (3, 3), padding=1))
    again = b.op(aten.reshape.default, y, [2, 2, channels, 9, 11])
    b.returns(b.op(aten.sum.dim_IntList, again, [1]))
    return whole, y, again


def test_what_winograd_reads_and_makes_is_in_blocks() -> None:
    """Whoever wants it plain moves less than Winograd saves."""
    b = Builder()
    made = _selective(b, 32)
    returned = b.conv(b.input(b.random(1, 64, 9, 9)), 64, (3, 3))
    b.returns(returned)
    gm = b.finish()
    found = assign_layouts(gm, BLOCK)
    assert [found[node] for node in made] == [BLOCKED, BLOCKED, "plain"]
    assert found[returned] == "plain"
    without = assign_layouts(gm, BLOCK, winograd=False)
    assert [without[node] for node in made] == ["plain", "plain", "plain"]


def test_few_channels_are_not_moved_for_winograd() -> None:
    b = Builder()
    whole, y, _ = _selective(b, 16)
    strided = b.input(b.random(1, 64, 9, 9))
    shifted = b.op(aten.permute.default, strided, [0, 1, 3, 2])
    b.returns(b.conv(b.conv(shifted, 64, (3, 3), stride=2), 4, (1, 1)))
    found = layouts(b)
    assert [found[node.name] for node in (whole, y, shifted)] == ["plain"] * 3


def test_winograd_between_plain_tensors() -> None:
    b = Builder(1)
    _selective(b, 32)
    program = check(b, tolerance=2e-5)
    assert "winograd" in origins(program)
    c = Builder(2)
    x = c.op(aten.permute.default, c.input(c.random(1, 64, 13, 12)), [0, 1, 3, 2])
    y = c.op(aten.relu.default, c.conv(x, 96, (3, 3), padding=1, groups=2))
    c.returns(c.op(aten.permute.default, y, [0, 2, 3, 1]))
    assert "winograd" in origins(check(c, tolerance=2e-5))
