"""Maps and reductions without a generator of their own: fused chains, broadcasts, moved data."""

from __future__ import annotations

import mmap
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from graphopt.backends.codegen import compile_kernels
from graphopt.backends.lower import lower
from graphopt.backends.target import get_target
from graphopt.errors import UnsupportedError
from graphopt.runtime.artifact import build_artifact
from tests.backends.harness import Builder, aten, check, compile_and_run, origins


def test_chains_with_broadcasts_are_one_kernel() -> None:
    b = Builder(1)
    x, row, column = (b.input(b.random(*s)) for s in ((3, 5, 7), (7,), (5, 1)))
    y = b.op(aten.mul.Tensor, b.op(aten.add.Tensor, x, row), column)
    y = b.op(aten.where.self, b.op(aten.gt.Scalar, x, 0), y, b.op(aten.tanh.default, x))
    b.returns(b.op(aten.sub.Tensor, y, b.constant(torch.tensor(0.25))))
    # What would be computed again for every place it is broadcast to is a kernel of its own.
    small = b.op(aten.mul.Tensor, b.op(aten.exp.default, row), column)
    b.returns(
        b.op(aten.add.Tensor, b.op(aten.sigmoid.default, small), b.input(b.random(2, 1, 5, 7)))
    )
    program = check(b)
    assert len(program.steps) == 4, [step.ops for step in program.steps]


def test_mixed_dtypes() -> None:
    b = Builder(2)
    x = b.input(b.random(4, 9) * 5)
    i = b.input(torch.randint(-(2**40), 2**40, (4, 9), generator=b.generator))
    small = b.input(torch.randint(-9, 9, (9,), dtype=torch.int32, generator=b.generator))
    flag = b.input(torch.rand(4, 1, generator=b.generator) > 0.5)
    double = b.input(b.random(4, 9).double())
    b.returns(
        b.op(aten.add.Tensor, i, small),
        b.op(aten.mul.Tensor, x, small),
        b.op(aten.add.Tensor, double, x),
        b.op(aten.where.self, flag, x, small),
        b.op(aten.logical_and.default, flag, b.op(aten.gt.Tensor, x, small)),
        b.op(aten.mul.Tensor, b.op(aten._to_copy.default, x, dtype=torch.int64), i),
        b.op(aten.sum.dim_IntList, b.op(aten.gt.Scalar, x, 0.0), [1]),
        b.op(aten._to_copy.default, flag, dtype=torch.float32),
        b.op(aten.bitwise_not.default, flag),
    )
    check(b)


def test_moved_data() -> None:
    b = Builder(3)
    x = b.input(b.random(2, 6, 5, 4))
    y = b.op(aten.permute.default, b.op(aten.slice.Tensor, x, 2, 1, 4), [0, 3, 1, 2])
    y = b.op(aten.constant_pad_nd.default, b.op(aten.neg.default, y), [1, 0, 2, 1], 3.0)
    b.returns(y)
    z = b.op(aten.cat.default, [b.op(aten.relu.default, x), b.op(aten.square.default, x)], 1)
    b.returns(b.op(aten.slice.Tensor, z, 1, 3, 9), b.op(aten.select.int, z, 1, -1))
    wide = b.op(aten.expand.default, b.op(aten.select.int, x, 0, 1), [3, 6, 5, 4])
    b.returns(b.op(aten.mul.Tensor, wide, b.input(b.random(3, 1, 1, 4))))
    index = b.input(torch.tensor([5, -1, 0]))
    chosen = b.op(
        aten.index_select.default, b.op(aten.sin.default, x), 1, b.input(torch.tensor([5, 0]))
    )
    b.returns(b.op(aten.add.Tensor, chosen, 1.0))
    places = b.op(aten.remainder.Scalar, b.op(aten.add.Tensor, index, 6), 6)
    b.returns(b.op(aten.embedding.default, b.constant(b.random(6, 9)), places))
    check(b)


def test_indices_outside_are_kept_inside() -> None:
    """PyTorch raises; a library on a board reads the nearest element instead of other memory."""
    b = Builder(4)
    x = b.input(torch.arange(5.0))
    b.returns(b.op(aten.index_select.default, x, 0, b.input(torch.tensor([0, 1, 2, 3]))))
    gm = b.finish()
    _, (y,) = compile_and_run(gm, [b.inputs[0], torch.tensor([-1, 99, -99, 2])])
    assert y.tolist() == [4.0, 4.0, 0.0, 2.0]


@pytest.mark.parametrize("channels", [16, 12])
def test_channel_shuffle_and_other_reshapes_of_blocks(channels: int) -> None:
    b = Builder(5)
    x = b.conv(b.input(b.random(2, 3, 5, 4)), channels, (1, 1))
    y = b.op(aten.reshape.default, x, [2, 2, channels // 2, 5, 4])
    y = b.op(aten.permute.default, y, [0, 2, 1, 3, 4])
    y = b.op(aten.reshape.default, y, [2, channels, 5, 4])
    half = b.op(aten.slice.Tensor, x, 1, 0, channels // 2)
    rest = b.op(aten.slice.Tensor, x, 1, channels // 2, channels)
    joined = b.op(aten.cat.default, [b.op(aten.relu.default, half), rest, x], 1)
    b.returns(b.conv(y, 7, (3, 3)), b.conv(joined, 9, (1, 1)))
    b.returns(b.op(aten.reshape.default, x, [2, -1]), b.op(aten.permute.default, x, [0, 2, 3, 1]))
    pooled = b.op(aten.mean.dim, x, [2, 3], True)
    flat = b.op(aten.reshape.default, pooled, [2, channels])
    b.returns(b.op(aten.linear.default, flat, b.constant(b.random(5, channels))))
    b.returns(b.conv(b.op(aten.mul.Tensor, x, b.op(aten.sigmoid.default, pooled)), 3, (1, 1)))
    check(b)


def test_outputs_of_every_kind() -> None:
    """Inputs, constants, views, one value twice, and a value that is also read."""
    b = Builder(6)
    x = b.input(b.random(3, 4))
    y = b.op(aten.exp.default, x)
    view = b.op(aten.reshape.default, y, [4, 3])
    b.returns(x, x, b.constant(b.random(2, 2)), y, y, view, b.op(aten.reshape.default, x, [12]))
    b.returns(b.op(aten.sqrt.default, view), b.constant(torch.tensor(7)))
    blocked = b.conv(b.input(b.random(1, 3, 4, 4)), 5, (1, 1))
    b.returns(blocked, b.conv(blocked, 4, (3, 3)), b.op(aten.reshape.default, blocked, [5, 16]))
    check(b)


def test_scalars_and_single_elements() -> None:
    b = Builder(7)
    x, y = b.input(torch.tensor(1.5)), b.input(torch.tensor([[-2.0]]))
    z = b.op(aten.add.Tensor, b.op(aten.exp.default, x), y)
    b.returns(z, b.op(aten.mul.Tensor, x, b.constant(torch.tensor([3.0]))))
    b.returns(b.op(aten.expand.default, x, [2, 3]), b.op(aten.sum.default, z))
    b.returns(b.op(aten.softmax.int, x, 0), b.op(aten.reshape.default, y, []))
    b.returns(b.op(aten.cat.default, [b.op(aten.reshape.default, x, [1, 1]), y], 0))
    b.returns(b.op(aten.mean.default, b.input(b.random(3, 5))))
    b.returns(b.op(aten.add.Tensor, b.input(torch.tensor(3)), b.input(torch.tensor(True))))
    check(b)


def test_reductions_with_prologue_and_epilogue() -> None:
    b = Builder(8)
    x = b.input(b.random(4, 6, 33))
    for axes, keep in (([2], False), ([1], True), ([0, 2], False), ([0, 1, 2], False)):
        y = b.op(aten.mean.dim, b.op(aten.square.default, x), axes, keep)
        b.returns(b.op(aten.sqrt.default, b.op(aten.add.Tensor, y, 1e-3)))
    program = check(b)
    assert len(program.steps) == 4, [step.ops for step in program.steps]
    assert set(origins(program)) == {"reduce"}


@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 40), st.integers(1, 13), st.booleans())
@example(1, 9, 40, 5, True)
@example(2, 17, 16, 2, False)
@example(1, 8, 32, 1, True)
@example(2, 1, 10, 12, True)
def test_long_boxes(batch: int, channels: int, rows: int, columns: int, has_nan: bool) -> None:
    """Folded by several accumulators, in blocks and along the first axes of plain tensors."""
    b = Builder(rows)
    image = b.random(batch, 3, rows, columns)
    x = b.conv(b.input(image), channels, (1, 1))
    mean = b.op(aten.mean.dim, b.op(aten.square.default, x), [2, 3], True)
    b.returns(b.conv(b.op(aten.sqrt.default, mean), 4, (1, 1)))
    plain = b.random(rows, columns, channels)
    if has_nan:
        plain[rows // 2, columns // 2, 0] = float("nan")
    y = b.input(plain)
    b.returns(
        *(
            b.op(aten.isnan.default, b.op(op, y, [0, 1]))
            for op in (aten.amax.default, aten.amin.default)
        )
    )
    z = b.input(b.random(rows, columns, channels))
    b.returns(b.op(aten.amax.default, z, [0, 1]), b.op(aten.amin.default, z, [0, 1]))
    # Terms of one sign: what is left of others may be no larger than their rounding.
    terms = b.input(b.random(rows, columns, channels).abs())
    b.returns(b.op(aten.sum.dim_IntList, terms, [0, 1]))
    check(b, tolerance=5e-6)


def test_a_value_read_by_many_is_computed_once() -> None:
    b = Builder(9)
    y = b.op(aten.exp.default, b.input(b.random(40, 50)))
    b.returns(*(b.op(aten.sum.dim_IntList, y, [axis]) for axis in (0, 1)))
    program = check(b)
    assert [step.ops for step in program.steps].count(("exp",)) == 1


@pytest.mark.parametrize("threads", [1, 3])
def test_long_rows_and_many_tasks(threads: int) -> None:
    b = Builder(10)
    for shape in ((10007,), (3, 4099), (4099, 3), (9, 1, 1031, 1), (2, 3, 5, 7, 11)):
        x = b.input(b.random(*shape))
        b.returns(
            b.op(aten.neg.default, x), b.op(aten.add.Tensor, x, b.input(b.random(*shape[-1:])))
        )
    check(b, threads=threads)


def test_tensors_without_elements_are_refused() -> None:
    b = Builder(11)
    x = b.input(torch.zeros(0, 3, 4, 4))
    b.returns(b.op(aten.relu.default, b.conv(x, 4, (1, 1))))
    b.returns(b.op(aten.slice.Tensor, b.input(b.random(4, 5)), 1, 3, 3))
    with pytest.raises(UnsupportedError, match="hint: give example inputs") as error:
        check(b)
    # Each where it begins, not everything that follows.
    assert [place.split(" (")[0] for place in error.value.where] == [
        "input x0 has shape", "result of aten::slice.Tensor has shape",
    ]  # fmt: skip
    assert "(test)" in error.value.where[1]


def test_what_is_gathered_from_padding_is_guarded_lane_by_lane() -> None:
    """Such a store reads a place bound before it, which a loop of its own would not find."""
    b = Builder(13)
    padded = b.op(aten.constant_pad_nd.default, b.input(b.random(2, 9, 5)), [0, 0, 2, 3])
    places = b.input(torch.tensor([0, 13, 2, 10, 11, 5, 1, 8, 12, 3]))
    b.returns(b.op(aten.permute.default, b.op(aten.index_select.default, padded, 1, places),
                   [0, 2, 1]))  # fmt: skip
    assert len(check(b).steps) == 1


def test_what_pads_and_concatenations_guard_is_not_read_elsewhere() -> None:
    """Functions and gathers bind values ahead of the guard: they get kernels of their own."""
    b = Builder(12)
    x = b.input(b.random(2, 3, 5, 7))
    y = b.op(aten.sigmoid.default, x)
    b.returns(b.op(aten.constant_pad_nd.default, y, [1, 2, 3, 4], 1.5))
    moved = b.op(aten.permute.default, x, [0, 1, 2, 3])
    b.returns(b.op(aten.cat.default, [b.op(aten.exp.default, x), moved], 2))
    places = b.input(torch.tensor([1, 6, 0]))
    chosen = b.op(aten.index_select.default, x, 3, places)
    b.returns(b.op(aten.constant_pad_nd.default, chosen, [1, 1], 0.5))
    program = check(b)
    guarded = [step.ops for step in program.steps if {"pad", "cat"} & set(step.ops)]
    assert all(not {"sigmoid", "exp", "index_select"} & set(ops) for ops in guarded)


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory by mprotect")
def test_a_plain_image_is_not_read_past_its_end(tmp_path: Path) -> None:
    """Its last 12 channels, moved to blocks before a depthwise layer; then comes a guarded page."""
    b = Builder(9)
    image = b.random(1, 20, 16, 16)
    last = b.op(aten.slice.Tensor, b.input(image), 1, 8, 20)
    b.returns(b.conv(last, 12, (3, 3), groups=12))
    gm = b.finish()
    target = get_target("host")
    program = lower(gm, target, "sample")
    artifact = build_artifact(program, target, compile_kernels(program, target), tmp_path / "out")
    code = f"""
        import ctypes, mmap, sys
        import numpy as np
        import graphopt
        pages = {image.numel() * 4 // mmap.PAGESIZE}
        memory = mmap.mmap(-1, (pages + 16) * mmap.PAGESIZE)
        array = np.frombuffer(memory, np.float32)
        mprotect = ctypes.CDLL(None).mprotect
        mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        end = array.ctypes.data + pages * mmap.PAGESIZE
        assert mprotect(end, 16 * mmap.PAGESIZE, 0) == 0
        with graphopt.load(sys.argv[1]) as model:
            model(array[: {image.numel()}].reshape({tuple(image.shape)}))
        print("done", flush=True)
        import os
        os._exit(0)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(artifact.folder)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.stdout == "done\n", run.stderr


def test_gathers_through_padding() -> None:
    """Rows and columns picked from a padded image, as unfolding does."""
    b = Builder(3)
    node = b.op(aten.constant_pad_nd.default, b.input(b.random(1, 2, 5, 6)), [1, 1, 1, 1], 0.5)
    for dim in (2, 3):
        node = b.op(aten.index_select.default, node, dim, b.constant(torch.arange(11) % 7))
    b.returns(node)
    check(b, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_integer_division_never_ends_the_program(dtype: torch.dtype) -> None:
    """By 0, where PyTorch raises, and the smallest number by -1: x86 processors trap at both."""
    b = Builder(0)
    signed = dtype.is_signed
    smallest = torch.iinfo(dtype).min
    x = b.input(torch.tensor([7, 100, smallest, smallest, 9], dtype=dtype))
    y = b.input(torch.tensor([2, 0, -1 if signed else 3, 0, 3], dtype=dtype))
    for mode in ("floor", "trunc"):
        b.returns(b.op(aten.div.Tensor_mode, x, y, rounding_mode=mode))
    b.returns(b.op(aten.remainder.Tensor, x, y), b.op(aten.fmod.Tensor, x, y))
    _, (*quotients, modulo, rest) = compile_and_run(b.finish(), [node for node in b.inputs])
    for quotient in quotients:
        assert quotient.tolist() == [3, 100, smallest, smallest, 3]
    assert modulo.tolist() == rest.tolist() == [1, 0, 0, 0, 0]


def test_numbers_that_bytes_do_not_have() -> None:
    """A byte is never below 0, and -1 is 255 there; TVM ends the program if asked naively."""
    b = Builder(0)
    x = b.input(torch.tensor([250, 3, 255, 0, *range(60, 93)], dtype=torch.uint8))
    below = [b.op(op, x, 0) for op in (aten.lt.Scalar, aten.ge.Scalar)]
    b.returns(
        *below, *(b.op(aten.where.self, test, x, b.op(aten.neg.default, x)) for test in below)
    )
    for op in (aten.gt, aten.le, aten.eq, aten.mul, aten.remainder, aten.fmod, aten.bitwise_and):
        b.returns(b.op(op.Scalar, x, -7))
    for op in (aten.relu, aten.abs, aten.sign):
        b.returns(b.op(op.default, x))
    b.returns(
        b.op(aten.clamp.default, x, 0, 200), b.op(aten.clamp.default, x, -1, None),
        b.op(aten.add.Tensor, x, x, alpha=-2), b.op(aten.sub.Scalar, x, 300),
        b.op(aten.maximum.default, x, b.constant(torch.tensor(0, dtype=torch.uint8))),
        b.op(aten.amax.default, x, [0]), b.op(aten.amin.default, x, [0]),
    )  # fmt: skip
    check(b)


def test_rounded_quotients_of_truth_values() -> None:
    b = Builder(0)
    x = b.input(torch.arange(37) % 3 == 0)
    b.returns(*(b.op(aten.remainder.Scalar, x, by) for by in (-7, 5)))
    b.returns(*(b.op(aten.div.Scalar_mode, x, by, rounding_mode="floor") for by in (-4, 2)))
    check(b)
