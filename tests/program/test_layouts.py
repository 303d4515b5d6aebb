"""Which tensors are kept in blocks of channels."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.target import get_target
from graphopt.program.layouts import InBlocks, Wants, assign_layouts
from tests.backends.harness import Builder, aten, check, compile_and_run, origins

BLOCK = 8
BLOCKED = "NCHW8c"


def nothing(_: fx.Node) -> InBlocks:
    return InBlocks()


def layouts(b: Builder, wants: Wants = nothing) -> dict[str, str]:
    gm = b.finish()
    return {node.name: layout for node, layout in assign_layouts(gm, BLOCK, wants).items()}


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
    found = assign_layouts(gm, BLOCK, nothing)
    assert [found[node] for node in (*parts, both)] == [BLOCKED] * 3
    assert [found[node] for node in (alone, rows)] == ["plain"] * 2
    program, actual = compile_and_run(gm, b.inputs)
    for ours, theirs in zip(actual, gm(*b.inputs), strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=4e-6)
    assert "cat" not in {op for step in program.steps for op in step.ops}


def test_what_a_convolution_wants_in_blocks() -> None:
    """Of plain tensors: what it reads, what it makes with what is fused behind, both or neither."""

    def chain(wish: InBlocks) -> list[str]:
        b = Builder()
        moved = b.op(aten.permute.default, b.input(b.random(1, 16, 5, 4)), [0, 1, 3, 2])
        y = b.op(aten.silu.default, b.conv(moved, 16, (3, 3)))
        b.returns(b.op(aten.permute.default, y, [0, 2, 3, 1]))
        found = layouts(b, lambda node: wish if "convolution" in node.name else InBlocks())
        return [found[node.name] for node in (moved, *y.all_input_nodes, y)]

    plain = "plain"
    assert chain(InBlocks()) == [plain] * 3
    assert chain(InBlocks(reads=True)) == [BLOCKED, plain, plain]
    assert chain(InBlocks(makes=True)) == [plain, BLOCKED, BLOCKED]
    assert chain(InBlocks(reads=True, makes=True)) == [BLOCKED] * 3


def test_matrix_products_make_no_blocks() -> None:
    """Whatever reads them: their kernels write rows."""
    b = Builder()
    x = b.op(aten.matmul.default, b.input(b.random(1, 16, 5, 4)), b.input(b.random(1, 16, 4, 6)))
    b.returns(b.conv(x, 16, (3, 3)))
    found = layouts(b, lambda _: InBlocks(reads=True, makes=True))
    assert found[x.name] == "plain"
