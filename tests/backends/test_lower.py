"""Lowering as a whole: errors, memory reused and not overlapping, kernels shared, determinism."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.lower import live_bytes, lower
from graphopt.backends.target import get_target
from graphopt.errors import UnsupportedError
from graphopt.program.ir import ALIGNMENT, Program
from graphopt.program.memory import lifetimes_of, round_up
from tests.backends.harness import Builder, aten, check

HOST = get_target("host")
TARGETS = ("x86-64-v3", "x86-64-v4", "arm")
"""With blocks of 8 and of 16 channels."""


def residual_network() -> Builder:
    """Inverted residual blocks with squeeze and excitation, as in the zoo's image models."""
    b = Builder(1)
    x = b.conv(b.input(b.random(1, 3, 32, 32)), 16, (3, 3), stride=2, padding=1)
    for channels, stride in ((16, 1), (16, 1), (24, 2), (24, 1), (40, 2), (40, 1)):
        y = b.op(aten.hardswish.default, b.conv(x, 4 * channels, (1, 1)))
        y = b.conv(y, 4 * channels, (5, 5), stride=stride, padding=2, groups=4 * channels)
        gate = b.op(aten.mean.dim, y, [2, 3], True)
        gate = b.op(aten.hardsigmoid.default, b.conv(gate, 4 * channels, (1, 1)))
        z = b.conv(b.op(aten.mul.Tensor, y, gate), channels, (1, 1))
        x = b.op(aten.add.Tensor, x, z) if G.shape(x) == G.shape(z) else z
    flat = b.op(aten.reshape.default, b.op(aten.mean.dim, x, [2, 3], True), [1, 40])
    b.returns(b.op(aten.linear.default, flat, b.constant(b.random(10, 40))))
    return b


def transformer() -> Builder:
    """Two encoder layers."""
    b = Builder(2)
    x = b.input(b.random(1, 20, 32))
    for _ in range(2):
        q, k, v = (
            b.op(aten.permute.default, b.op(aten.reshape.default, b.op(
                aten.linear.default, x, b.constant(b.random(32, 32) / 6)), [1, 20, 4, 8]),
                [0, 2, 1, 3])
            for _ in range(3)
        )  # fmt: skip
        y = b.op(aten.scaled_dot_product_attention.default, q, k, v)
        y = b.op(aten.reshape.default, b.op(aten.permute.default, y, [0, 2, 1, 3]), [1, 20, 32])
        y = b.op(aten.linear.default, y, b.constant(b.random(32, 32) / 6))
        x = b.op(aten.layer_norm.default, b.op(aten.add.Tensor, y, x), [32])
        h = b.op(aten.linear.default, x, b.constant(b.random(128, 32) / 6))
        y = b.op(
            aten.linear.default, b.op(aten.gelu.default, h), b.constant(b.random(32, 128) / 12)
        )
        x = b.op(aten.layer_norm.default, b.op(aten.add.Tensor, y, x), [32])
    b.returns(x)
    return b


def dense_block() -> Builder:
    """Concatenation of everything before: many tensors live at once."""
    b = Builder(3)
    x = b.conv(b.input(b.random(2, 3, 12, 12)), 16, (3, 3), padding=1)
    parts = [x]
    for _ in range(4):
        joined = b.op(aten.cat.default, parts, 1) if len(parts) > 1 else x
        parts.append(b.op(aten.relu.default, b.conv(joined, 8, (3, 3), padding=1)))
    b.returns(b.op(aten.cat.default, parts, 1), parts[2])
    return b


NETWORKS = {"residual": residual_network, "transformer": transformer, "dense": dense_block}


def overlaps(program: Program) -> list[tuple[str, str]]:
    """Pairs of arena tensors in the same memory at the same time, other than work in place.

    In place, the step that writes one tensor is the last that reads the other, and both begin at
    the same place.
    """
    lives = list(lifetimes_of(program.steps, program.buffers).values())
    found = []
    for i, one in enumerate(lives):
        for other in lives[i + 1 :]:
            a, b = program.buffers[one.name], program.buffers[other.name]
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            together = one.first <= other.last and other.first <= one.last
            in_place = a.offset == b.offset and (one.last == other.first or other.last == one.first)
            if together and not apart and not in_place:
                found.append((one.name, other.name))
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_in_little_memory(name: str) -> None:
    program = check(NETWORKS[name](), tolerance=1e-5, threads=2)
    assert overlaps(program) == []
    for buffer in program.buffers.values():
        assert buffer.offset % ALIGNMENT == 0
        if buffer.role == "arena":
            assert buffer.offset + buffer.nbytes <= program.arena
    # One line more than the plan, for reads of a whole vector at the last element.
    assert program.arena - ALIGNMENT <= 1.3 * live_bytes(program)


@pytest.mark.parametrize("name", NETWORKS)
def test_is_deterministic_and_leaves_the_graph_alone(name: str) -> None:
    gm = NETWORKS[name]().finish()
    before = str(gm.graph)
    first, again = (lower(gm, HOST, "m") for _ in range(2))
    assert str(gm.graph) == before
    other = lower(NETWORKS[name]().finish(), HOST, "m")
    assert first == again == other
    for a, b in zip(first.steps, other.steps, strict=True):
        assert str(a.kernel.prim_func) == str(b.kernel.prim_func)


def test_works_in_place_where_an_operand_dies() -> None:
    b = Builder(4)
    x = b.op(aten.exp.default, b.input(b.random(4, 8)))
    weight = b.constant(b.random(8, 8))
    y = b.op(
        aten.add.Tensor, b.op(aten.linear.default, b.op(aten.permute.default, x, [0, 1]), weight), x
    )
    b.returns(b.op(aten.sum.dim_IntList, y, [0]))
    program = check(b)
    places = [program.buffers[step.writes[0]] for step in program.steps]
    assert [p.role for p in places] == ["arena", "arena", "arena", "output"]
    assert places[0].offset == places[2].offset != places[1].offset


def test_does_not_work_in_place_where_an_operand_lives_on() -> None:
    b = Builder(5)
    x = b.op(aten.exp.default, b.input(b.random(4, 8)))
    weight = b.constant(b.random(8, 8))
    y = b.op(aten.add.Tensor, b.op(aten.linear.default, x, weight), x)
    z = b.op(aten.add.Tensor, b.op(aten.linear.default, y, weight), x)
    b.returns(b.op(aten.sum.dim_IntList, z, [0]), b.op(aten.sum.dim_IntList, y, [1]))
    assert overlaps(check(b)) == []


def test_the_second_candidate_dies() -> None:
    """The first operand is read again later; the second one's memory is taken."""
    b = Builder(6)
    x, y = (b.op(op, b.input(b.random(6, 7))) for op in (aten.exp.default, aten.neg.default))
    b.returns(b.op(aten.sum.dim_IntList, y, [0]))
    total = b.op(aten.add.Tensor, x, y)
    b.returns(*(b.op(aten.sum.dim_IntList, v, [axis]) for v in (total, x) for axis in (0, 1)))
    program = check(b)
    names = {step.ops: program.buffers[step.writes[0]] for step in program.steps}
    assert names["add",].offset == names["neg",].offset != names["exp",].offset


def test_a_layer_is_not_in_place_over_its_own_input() -> None:
    b = Builder(7)
    x = b.op(aten.exp.default, b.input(b.random(6, 16)))
    one, other = (b.op(aten.reshape.default, x, [1, 6, 16]) for _ in range(2))
    y = b.op(aten.linear.default, one, b.constant(b.random(16, 16)))
    y = b.op(aten.add.Tensor, y, other)
    b.returns(b.op(aten.sum.dim_IntList, y, [0]))
    program = check(b)
    first, second = (program.buffers[step.writes[0]] for step in program.steps[:2])
    assert first.offset != second.offset


def test_equal_kernels_and_constants_are_shared() -> None:
    b = Builder(8)
    x = b.input(b.random(9, 24))
    weight = b.random(24, 24) / 5
    for _ in range(3):
        x = b.op(aten.relu.default, b.op(aten.linear.default, x, b.constant(weight.clone())))
        x = b.op(aten.softmax.int, x, -1)
    b.returns(x)
    program = check(b)
    assert len(program.steps) == 6
    assert len({step.kernel.symbol for step in program.steps}) == 2
    constants = [buffer for buffer in program.buffers.values() if buffer.role == "constant"]
    assert len(constants) == 1
    assert program.weights == round_up(constants[0].nbytes) + ALIGNMENT


@pytest.mark.parametrize(
    ("rows", "picked", "is_read_whole", "is_sparse"),
    [
        (4000, 500, False, True),
        (4000, 501, False, False),
        (3000, 8, False, False),  # under 1 MB
        (4000, 8, True, False),
    ],
)
def test_tables_are_constants_of_which_little_is_read(
    rows: int, picked: int, is_read_whole: bool, is_sparse: bool
) -> None:
    b = Builder(10)
    indices = b.input(torch.randint(rows, (picked,), generator=b.generator))
    table = b.constant(b.random(rows, 80))
    b.returns(b.op(aten.embedding.default, table, indices))
    if is_read_whole:
        b.returns(b.op(aten.sum.dim_IntList, b.op(aten.relu.default, table), [0]))
    program = check(b)
    (buffer,) = (c for c in program.buffers.values() if c.nbytes == rows * 80 * 4)
    assert buffer.sparse == is_sparse


def test_a_table_read_twice_counts_twice() -> None:
    b = Builder(11)
    table = b.constant(b.random(4000, 80))
    first, second = (b.input(torch.randint(4000, (n,), generator=b.generator)) for n in (300, 201))
    b.returns(b.op(aten.index_select.default, table, 0, first),
              b.op(aten.index_select.default, table, 0, second))  # fmt: skip
    assert not any(buffer.sparse for buffer in check(b).buffers.values())


def test_every_unsupported_node_is_listed() -> None:
    b = Builder(9)
    x = b.input(b.random(4, 4))

    def call(target: object, *args: object, origin: str) -> fx.Node:
        return G.call(b.gm.graph, target, args, origin=(origin,))  # type: ignore[arg-type]

    strange = call(aten.logcumsumexp.default, x, 1, origin="layer1")
    double = b.op(aten._to_copy.default, x, dtype=torch.float64)
    product = call(aten.matmul.default, double, double, origin="layer2")
    parts = call(
        aten.view_as_complex.default, b.op(aten.reshape.default, x, [4, 2, 2]), origin="layer3"
    )
    weight = call(aten.neg.default, x, origin="fine")
    layer = call(aten.linear.default, x, weight, origin="layer4")
    b.returns(strange, product, b.op(aten.reshape.default, parts, [8]), layer)
    with pytest.raises(UnsupportedError) as error:
        lower(b.finish(), HOST, "m")
    text = str(error.value)
    for origin, reason in [
        ("layer1", "aten::logcumsumexp: no such operator"),
        ("layer2", "matmul: torch.float64 is not supported"),
        ("layer3", "no such operator"),
        ("layer4", "linear: its weight is computed at run time"),
    ]:
        line = next(line for line in text.splitlines() if origin in line)
        assert reason in line
    assert "fine" not in text
    assert "CONTRIBUTING.md" in text


def test_input_of_a_strange_dtype() -> None:
    b = Builder(10)
    b.returns(b.input(torch.zeros(3, dtype=torch.complex64)))
    with pytest.raises(UnsupportedError, match=r"input x0: dtype torch.complex64 is not supported"):
        lower(b.finish(), HOST, "m")


def test_small_steps_stay_on_one_thread() -> None:
    b = Builder(11)
    small, large = b.input(b.random(8, 8)), b.input(b.random(512, 512))
    b.returns(b.op(aten.softmax.int, small, -1), b.op(aten.softmax.int, large, -1))
    program = lower(b.finish(), HOST, "m")
    steps = {program.buffers[step.writes[0]].shape: step for step in program.steps}
    assert steps[8, 8].grain == steps[8, 8].tasks
    assert steps[512, 512].grain < steps[512, 512].tasks / 4


def test_large_moves_are_shared_among_threads() -> None:
    b = Builder(13)
    b.returns(b.op(aten.permute.default, b.input(b.random(64, 32, 48)), [2, 1, 0]))
    (step,) = lower(b.finish(), HOST, "m").steps
    assert step.flops == 0
    assert step.tasks >= 8 * step.grain


def test_what_the_caller_gets_is_not_read_by_blocked_kernels() -> None:
    """A returned tensor of 10 channels has no padding channels behind it that a kernel may read."""
    b = Builder(20)
    y = b.conv(b.input(b.random(2, 3, 9, 7)), 10, (1, 1))
    z = b.op(aten.relu.default, y)
    pooled = b.op(aten.max_pool2d.default, y, [2, 2], [2, 2], [0, 0], [1, 1], False)
    b.returns(y, b.conv(z, 4, (3, 3)), b.conv(pooled, 5, (1, 1)))
    program = check(b)
    owned = {name for name, buffer in program.buffers.items() if buffer.role == "output"}
    assert not owned & {name for step in program.steps for name in step.reads}


def concatenating(block: int) -> Builder:
    """Concatenations in place, nested, one the beginning of another, and some that cannot be."""
    b = Builder(5)
    x = b.conv(b.input(b.random(1, 3, 8, 8)), 2 * block, (3, 3), padding=1)
    y = b.conv(x, block, (3, 3), padding=1)
    z = b.op(aten.relu.default, b.conv(b.op(aten.cat.default, [x, y], 1), 2 * block, (1, 1)))
    w = b.conv(b.op(aten.cat.default, [x, y, z], 1), block, (1, 1))
    inner = b.op(aten.cat.default, [w, b.conv(w, 3 * block, (1, 1))], 1)
    outer = b.op(aten.cat.default, [inner, b.op(aten.sigmoid.default, z)], 1)
    shuffled = b.op(aten.cat.default, [z, y], 1)
    ragged = b.op(aten.cat.default, [b.conv(w, 12, (1, 1)), b.conv(w, 5, (1, 1))], 1)
    scaled = b.op(aten.relu.default, b.op(aten.mul.Tensor, outer, outer))
    b.returns(b.conv(scaled, 4, (1, 1)), b.conv(shuffled, 4, (1, 1)), b.conv(ragged, 4, (1, 1)))
    return b


@pytest.mark.parametrize("target", TARGETS)
def test_concatenates_in_place(target: str) -> None:
    block = get_target(target).isa.block
    program = check(concatenating(block), tolerance=1e-5, threads=2, target=target)
    copies = [step.ops for step in program.steps if "cat" in step.ops]
    # Those whose parts are needed in two orders, or do not end with a block.
    assert len(copies) == 2
    assert overlaps(program) == []
    pieces = [b for b in program.buffers.values() if b.within]
    for piece in pieces:
        holder = program.buffers[piece.within or ""]
        assert holder.offset <= piece.offset
        assert piece.offset + piece.nbytes <= holder.offset + holder.nbytes
    assert len(pieces) == 8


def slicing(block: int) -> Builder:
    """Slices of plain and blocked tensors that are read in place, and some that cannot be."""
    b = Builder(6)
    half, double, whole = block // 2, 2 * block, 4 * block
    x = b.op(aten.relu.default, b.conv(b.input(b.random(1, 3, 8, 8)), whole, (3, 3), padding=1))
    # In place, both halves, one of them twice; the whole is read later.
    first, last = (b.op(aten.slice.Tensor, x, 1, *ends) for ends in ((0, double), (-double, 99)))
    quarter = b.op(aten.slice.Tensor, first, 1, block, double)
    y = b.conv(b.op(aten.relu.default, b.conv(first, double, (3, 3), padding=1)), block, (1, 1))
    z = b.op(aten.max_pool2d.default, last, [2, 2], [2, 2], [0, 0], [1, 1], False)
    joined = b.op(aten.cat.default, [y, b.conv(quarter, block, (1, 1))], 1)
    # Of a concatenation in place; plain, after a shuffle.
    last_of_it = b.op(aten.slice.Tensor, joined, 1, block, double)
    shuffled = b.op(aten.permute.default, b.op(aten.reshape.default, x, [1, 2, double, 8, 8]),
                    [0, 2, 1, 3, 4])  # fmt: skip
    plain = b.op(aten.reshape.default, shuffled, [1, whole, 8, 8])
    upper = b.op(aten.slice.Tensor, plain, 1, double, whole)
    lower_half = b.op(aten.slice.Tensor, plain, 1, 0, double)
    # Not in place: amid a block, along a row, with a step, a small part of the whole.
    amid = b.op(aten.slice.Tensor, x, 1, half, whole - half)
    rows = b.op(aten.slice.Tensor, plain, 2, 2, 8)
    step = b.op(aten.slice.Tensor, x, 1, 0, whole, 2)
    small = b.op(aten.slice.Tensor, joined, 1, 0, half)
    b.returns(
        *(b.conv(node, 4, (1, 1)) for node in (z, last_of_it, upper, amid, rows, step, small)),
        b.op(aten.add.Tensor, lower_half, 1.0), b.op(aten.sub.Tensor, x, 1.0),
    )  # fmt: skip
    return b


@pytest.mark.parametrize("target", TARGETS)
def test_slices_are_read_in_place(target: str) -> None:
    block = get_target(target).isa.block
    program = check(slicing(block), tolerance=1e-5, threads=2, target=target)
    copies = [step for step in program.steps if "slice" in step.ops and "add" not in step.ops]
    assert len(copies) == 4
    assert overlaps(program) == []
    pieces = [b for b in program.buffers.values() if b.within]
    assert len(pieces) == 7
    for piece in pieces:
        holder = program.buffers[piece.within or ""]
        assert holder.offset <= piece.offset
        assert piece.offset % 64 == 0
        assert piece.offset + piece.nbytes <= holder.offset + holder.nbytes


def test_a_slice_of_an_input_or_an_output_is_copied() -> None:
    """They are the caller's memory, of which a kernel may not read more than there is."""
    b = Builder(7)
    x = b.input(b.random(1, 12, 4, 4))
    y = b.op(aten.linear.default, b.input(b.random(1, 16)), b.constant(b.random(32, 16)))
    part = b.op(aten.slice.Tensor, y, 1, 0, 16)
    b.returns(
        b.conv(b.op(aten.slice.Tensor, x, 1, 0, 8), 4, (1, 1)), y,
        b.op(aten.linear.default, part, b.constant(b.random(4, 16))),
    )  # fmt: skip
    assert not [buffer for buffer in check(b).buffers.values() if buffer.within]
