"""The compiled object: what it refers to, which instructions it holds, that it is reproducible."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from tvm import tirx

from graphopt.backends.codegen import (
    _lowering,
    _with_common_lanes,
    assembly,
    compile_kernels,
    llvm_target,
)
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, get_target, targets
from graphopt.program.ir import Program
from tests.backends.harness import Builder, aten, compile_and_run

TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "arm")
# What a C library and its mathematics library define.
LIBC = {"memcpy", "memset", "memmove", "floorf", "ceilf", "truncf", "rintf", "nearbyintf", "roundf",
        "floor", "ceil", "trunc", "rint", "nearbyint", "round", "fmaf", "fma", "sqrtf", "sqrt",
        "fmodf", "fmod", "powf", "pow"}  # fmt: skip


@cache
def sample(target: str) -> Program:
    """A program with a kernel of every generator and every transcendental function."""
    b = Builder()
    x = b.conv(b.input(b.random(1, 3, 10, 10)), 16, (3, 3))
    y = b.conv(x, 16, (3, 3), padding=1, groups=16)
    for op in (aten.silu, aten.gelu, aten.tanh, aten.erf, aten.log, aten.sin, aten.exp, aten.round):
        b.returns(b.op(op.default, y))
    b.returns(
        b.op(aten.pow.Tensor_Scalar, y, 0.3),
        b.op(aten.div.Tensor_mode, x, y, rounding_mode="floor"),
    )
    b.returns(b.op(aten.max_pool2d.default, y, [3, 3], [2, 2]))
    rows = b.op(aten.reshape.default, y, [64, 16])
    z = b.op(aten.linear.default, rows, b.constant(b.random(16, 16)))
    b.returns(b.op(aten.softmax.int, z, -1), b.op(aten.layer_norm.default, z, [16]))
    heads = b.op(aten.reshape.default, z, [1, 2, 32, 16])
    b.returns(b.op(aten.scaled_dot_product_attention.default, heads, heads, heads))
    b.returns(b.op(aten._to_copy.default, z, dtype=torch.float64))
    half = b.input(torch.ones(37, dtype=torch.float16))
    b.returns(
        b.op(aten.add.Tensor, half, half), b.op(aten._to_copy.default, half, dtype=torch.float32)
    )
    i = b.input(torch.arange(37))
    b.returns(
        b.op(aten.remainder.Scalar, i, 5), b.op(aten._to_copy.default, i, dtype=torch.float32)
    )
    return lower(b.finish(), get_target(target), "sample")


@pytest.mark.parametrize("target", TARGETS)
def test_refers_to_the_c_library_only(target: str, tmp_path: Path) -> None:
    path = tmp_path / "kernels.o"
    path.write_bytes(compile_kernels(sample(target), get_target(target)))
    listing = subprocess.run(
        ["nm", "--undefined-only", "--format=just-symbols", path], capture_output=True, text=True,
        check=True,
    ).stdout  # fmt: skip
    assert set(listing.split()) <= LIBC
    defined = subprocess.run(
        ["nm", "--defined-only", "--extern-only", "--format=posix", path],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    # TVM always adds two conversions of half precision, weak: any other definition goes first.
    others = [line.split()[:2] for line in defined if not line.startswith("sample_k_")]
    assert sorted(others) == [["__extendhfsf2", "W"], ["__truncsfhf2", "W"]]


@pytest.mark.parametrize(
    ("target", "beyond"),
    [
        # 256-bit registers and the three-operand forms came with AVX.
        ("x86-64-v2", r"%[yz]mm\d+|^\s+v[a-z]+p[sd]\b|\bvfmadd|\bandn\b|\bmulx\b"),
        ("x86-64-v3", r"%zmm\d+|%xmm(1[6-9]|2\d|3[01])\b|%k[0-7]\b"),
        # Dot products, counts of bits, permutations of bytes, half precision.
        ("x86-64-v4", r"\bvpdp|\bvpopcnt|\bvperm(i2|t2)?b\b|\bv(?!cvtps2)\w+ph\b"),
        # Half precision, dot product, SVE.
        ("arm", r"\bv\d+\.(8h|4h), v\d+\.(8h|4h), v\d+\.(8h|4h)|\b[us]dot\b|\bz\d+\.s\b|\bldadd"),
    ],
)
def test_no_instruction_the_target_lacks(target: str, beyond: str) -> None:
    text = assembly(sample(target), get_target(target))
    code = "\n".join(
        line for line in text.splitlines() if line.startswith("\t") and not line.startswith("\t.")
    )
    floats = code if target != "arm" else re.sub(r"^\t(?!f).*$", "", code, flags=re.M)
    found = re.search(beyond, floats, flags=re.M)
    assert found is None, floats[max(0, found.start() - 100) : found.end() + 100]
    expected = {
        "x86-64-v2": "mulps",
        "x86-64-v3": "vfmadd",
        "x86-64-v4": r"vfmadd\w+\t%zmm",
        "arm": "fmla",
    }
    assert re.search(expected[target], code)


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_bounds_keep_nan(target: str) -> None:
    """The instructions that do it differ: whole vectors, and a rest of single elements."""
    b = Builder(0)
    values = b.random(13) * 6
    values[[1, 9, 12]] = torch.nan
    x = b.input(values)
    b.returns(b.op(aten.relu.default, x), b.op(aten.hardtanh.default, x, -1.5, 6.0))
    gm = b.finish()
    for ours, theirs in zip(compile_and_run(gm, [values], target)[1], gm(values), strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())


def test_common_lanes_change_no_code() -> None:
    """They only spare FlattenBuffer loop variables: it looks at all of them for each index."""
    passes = list(_lowering().passes)
    others = [each for each in passes if each.info.name != "_with_common_lanes"]
    assert len(others) == len(passes) - 1
    description = llvm_target(get_target("host"))
    before = 0
    for step in sample("host").steps:
        func = step.kernel.prim_func.with_attr({"global_symbol": "kernel", "target": description})
        before = max(before, len(lane_variables(func)))
        assert len(lane_variables(_with_common_lanes(func))) <= 4
        ours, theirs = (
            tvm.ir.transform.Sequential(each)(tvm.IRModule({"kernel": func}))
            for each in (passes, others)
        )
        assert tvm_ffi.structural_equal(ours, theirs, map_free_vars=True)
    assert before > 50


def lane_variables(func: Any) -> set[Any]:
    """The variables of a function's vectorized loops."""
    found: set[Any] = set()

    def visit(loop: Any) -> None:
        if loop.kind == tirx.ForKind.VECTORIZED:
            found.add(loop.loop_var)

    tvm_ffi.structural_walk(func.body, (tirx.For, visit))
    return found


def test_is_reproducible() -> None:
    target = get_target("host")
    first = compile_kernels(sample("host"), target)
    assert compile_kernels(sample.__wrapped__("host"), target) == first


def test_targets_leave_llvm_as_it_was() -> None:
    """The Arm targets set options of LLVM, which are the process's."""
    first = compile_kernels(sample("x86-64-v3"), get_target("x86-64-v3"))
    compile_kernels(sample("cortex-a53"), get_target("cortex-a53"))
    assert compile_kernels(sample("x86-64-v3"), get_target("x86-64-v3")) == first


@pytest.mark.parametrize("target", [each for each in targets().values() if each.model])
def test_the_model_of_a_core_adds_no_features(target: Target) -> None:
    """LLVM takes features from the CPU's name too: only `generic` is known to have none."""
    assert target.model == "generic"


def test_program_without_steps() -> None:
    b = Builder()
    program = Program("empty", (), {}, (), (), 0, 0, 0)
    assert b.inputs == []
    assert compile_kernels(program, get_target("host")) == b""
