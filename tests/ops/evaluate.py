"""Compiles scalar expressions to one small shared library, for the operator tests.

Each function becomes one loop over flat float buffers, in vectors of eight and a scalar tail.
"""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import s_tir, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.ops.math import not_equal

LANES = 8
X86 = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"}
X86_NO_FMA = {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v2"}
ARM64 = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}
_STORED = {"bool": "uint8"}


@dataclass(frozen=True)
class Function:
    """Output element from one element of each operand; `inputs` and `output` are dtypes.

    `strides` are, per operand, (extent, stride) pairs of the output's dimensions, or None for
    operands that run along with the output.
    """

    compute: Callable[..., Any]
    inputs: tuple[str, ...]
    output: str
    shape: tuple[int, ...] | None = None
    strides: tuple[tuple[int, ...] | None, ...] = ()


def _prim_func(name: str, function: Function) -> Any:
    big = 1 << 28
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(name)
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        dtypes = [*function.inputs, function.output]
        pointers = [T.arg(f"p{i}", T.handle(_STORED.get(d, d))) for i, d in enumerate(dtypes)]
        count = T.arg("count", T.int32())
        buffers = [
            T.decl_buffer((big,), _STORED.get(d, d), data=p)
            for d, p in zip(dtypes, pointers, strict=True)
        ]

        def place(operand: int, flat: Any) -> Any:
            strides = function.strides[operand] if function.strides else None
            if strides is None:
                return flat
            assert function.shape is not None
            total: Any = 0
            for extent, stride in zip(function.shape[::-1], strides[::-1], strict=True):
                total = total + flat % extent * stride
                flat = flat // extent
            return total

        def element(flat: Any) -> None:
            values = []
            for i, dtype in enumerate(function.inputs):
                value = buffers[i][place(i, flat)]
                values.append(
                    not_equal(value, tirx.const(0, "uint8")) if dtype == "bool" else value
                )
            result = function.compute(*values)
            if function.output == "bool":
                result = tirx.Cast("uint8", result)
            T.buffer_store(buffers[-1], result, [flat])

        with T.serial(0, count // LANES) as block, T.vectorized(0, LANES) as lane:
            element(block * LANES + lane)
        with T.serial(0, count % LANES) as rest:
            element(count // LANES * LANES + rest)
    return builder.get()


def lower(functions: Mapping[str, Function], target: Mapping[str, str]) -> Any:
    """The LLVM module of these functions."""
    where = tvm.target.Target(dict(target))
    module = tvm.IRModule(
        {name: _prim_func(name, f).with_attr("target", where) for name, f in functions.items()}
    )
    passes = tirx.transform
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        module = tvm.ir.transform.Sequential(
            [
                s_tir.transform.CanonicalizeLoop(),
                s_tir.transform.LowerOpaqueBlock(),
                passes.FlattenBuffer(),
                passes.NarrowDataType(32),
                passes.VectorizeLoop(True),
                passes.UnrollLoop(),
                passes.StmtSimplify(),
                passes.RemoveNoOp(),
                passes.CommonSubexprElim(),
                passes.LowerIntrin(),
            ]
        )(module)
    return tvm.get_global_func("target.build.llvm")(module, where)


class Library:
    """Functions compiled for this machine."""

    def __init__(
        self, functions: Mapping[str, Function], folder: Path, target: Mapping[str, str] = X86
    ) -> None:
        self.functions = functions
        built = lower(functions, target)
        self.assembly: str = built.inspect_source("asm")
        built.write_to_file(str(folder / "k.o"), "o")
        library = folder / "k.so"
        subprocess.run(["gcc", "-shared", "-o", library, folder / "k.o", "-lm"], check=True)
        self._library = ctypes.CDLL(str(library))

    def run(self, name: str, *operands: np.ndarray, count: int | None = None) -> np.ndarray:
        function = self.functions[name]
        flat = [np.ascontiguousarray(a) for a in operands]
        for array, dtype in zip(flat, function.inputs, strict=True):
            assert array.dtype == np.dtype(dtype), (name, array.dtype, dtype)
        size = flat[0].size if count is None else count
        # One more, to see that nothing is written past the end.
        result = np.full(size + 1, 77, np.dtype(function.output))
        pointers = [ctypes.c_void_p(a.ctypes.data) for a in (*flat, result)]
        getattr(self._library, name)(*pointers, ctypes.c_int32(size))
        assert result[-1] == np.array(77).astype(function.output), f"{name} writes past the end"
        return result[:-1]


def function_bodies(assembly: str, names: Sequence[str]) -> dict[str, str]:
    """The instructions of each function."""
    bodies: dict[str, str] = {}
    current: str | None = None
    for line in assembly.splitlines():
        label = line.split(":")[0].strip()
        if not line.startswith(("\t", " ")) and line.rstrip().split("#")[0].strip().endswith(":"):
            if label in names:
                current = label
                bodies[current] = ""
            elif not label.startswith(".L"):
                current = None
        elif current is not None and not line.strip().startswith("."):
            bodies[current] += line + "\n"
        if line.startswith(".Lfunc_end"):
            current = None
    return bodies
