"""Small programs with kernels in C, so that the runtime is tested without the compiler above it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.backends.target import Target
from graphopt.backends.toolchain import find_toolchain
from graphopt.program.ir import Buffer, Kernel, Program, Step
from graphopt.runtime.artifact import Artifact, build_artifact

ROWS, COLUMNS, PICKED = 13, 32, 4
Array = np.ndarray[Any, Any]

_KERNELS = r"""
#include <stdint.h>
#include <string.h>
enum { COLUMNS = 32, ROWS = 13 };
/* What LLVM puts into every object that touches float16: must not leave the library. */
__attribute__((weak)) float __extendhfsf2(float x) { return x; }
float common_helper(float x) { return __extendhfsf2(x); }

void NAME_k_scale(float *x, float *w, float *out, int32_t begin, int32_t end) {
    for (int32_t row = begin; row < end; row++)
        for (int32_t c = 0; c < COLUMNS; c++)
            out[row * COLUMNS + c] = common_helper(x[row * COLUMNS + c]) * w[c];
}
void NAME_k_cumulate(float *a, float *bias, float *out, float *scratch, int32_t begin,
                     int32_t end) {
    for (int32_t row = begin; row < end; row++) {
        memcpy(scratch, a + row * COLUMNS, COLUMNS * sizeof *a);
        for (int32_t c = 1; c < COLUMNS; c++) scratch[c] += scratch[c - 1];
        for (int32_t c = 0; c < COLUMNS; c++) out[row * COLUMNS + c] = scratch[c] + bias[row];
    }
}
void NAME_k_pick(float *b, int64_t *ids, float *out, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++)
        memcpy(out + i * COLUMNS, b + ids[i] * COLUMNS, COLUMNS * sizeof *b);
}
void NAME_k_total(float *b, double *out, int32_t begin, int32_t end) {
    if (begin == end) return;
    *out = 0;
    for (int32_t i = 0; i < ROWS * COLUMNS; i++) *out += b[i];
}
"""


def _weights() -> tuple[Array, Array]:
    rng = np.random.default_rng(7)
    w = rng.integers(-8, 8, COLUMNS).astype(np.float32)
    return w, rng.integers(-8, 8, ROWS).astype(np.float32)


def rows_program(name: str = "rows") -> Program:
    """Two inputs, two outputs, arena, scratch, weights, parallel and serial steps."""
    w, bias = _weights()
    block = ROWS * COLUMNS * 4
    buffers = [
        Buffer("x", (ROWS, COLUMNS), "float32", "plain", "input", block),
        Buffer("row.ids", (PICKED,), "int64", "plain", "input", PICKED * 8),
        Buffer("w", w.shape, "float32", "plain", "constant", w.nbytes, 0, w),
        Buffer("bias", bias.shape, "float32", "plain", "constant", bias.nbytes, 128, bias),
        Buffer("a", (ROWS, COLUMNS), "float32", "plain", "arena", block, 0),
        Buffer("b", (ROWS, COLUMNS), "float32", "plain", "arena", block, 1664),
        Buffer("picked", (PICKED, COLUMNS), "float32", "plain", "output", PICKED * COLUMNS * 4),
        Buffer("total", (), "float64", "plain", "output", 8),
    ]

    def step(symbol: str, args: Sequence[str], tasks: int, **more: Any) -> Step:
        kernel = Kernel(symbol, None, "written in C")
        return Step(kernel, tuple(args), tuple(args[:-1]), (args[-1],), tasks, **more)

    steps = (
        step("scale", ("x", "w", "a"), ROWS, origin=("net.scale",), ops=("mul",), flops=416),
        step("cumulate", ("a", "bias", "b"), ROWS, grain=2, scratch=COLUMNS * 4),
        step("pick", ("b", "row.ids", "picked"), PICKED, grain=PICKED),
        step("total", ("b", "total"), 1),
    )
    return Program(name, steps, {b.name: b for b in buffers}, ("x", "row.ids"),
                   ("picked", "total"), 3328, 128, 192)  # fmt: skip


def rows_inputs(seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.integers(-16, 16, (ROWS, COLUMNS)).astype(np.float32)
    return x, rng.integers(0, ROWS, PICKED)


def rows_reference(x: Array, ids: Array) -> tuple[Array, Array]:
    """All values are small integers: float32 sums are exact in any order."""
    w, bias = _weights()
    b = np.cumsum(x * w, axis=1, dtype=np.float32) + bias[:, None]
    return b[ids], np.array(b.sum(dtype=np.float64))


@cache
def compile_kernels(source: str, target: Target) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernels.c").write_text(source, encoding="utf-8")
        toolchain = find_toolchain(target)
        # Default visibility, as TVM's objects have.
        flags = ("-O2", "-fvisibility=default")
        return toolchain.compile("kernels.c", "kernels.o", cwd=Path(folder), flags=flags)


def rows_kernels(target: Target, name: str = "rows") -> bytes:
    return compile_kernels(_KERNELS.replace("NAME", name), target)


def build_rows(folder: Path, target: Target, *, name: str = "rows", **options: Any) -> Artifact:
    return build_artifact(rows_program(name), target, rows_kernels(target, name), folder, **options)


def tool(name: str, package: str) -> str:
    """Path of a system tool; a test that needs one fails without it."""
    found = shutil.which(name)
    assert found, f"this test needs {name}: apt install {package}"
    return found


def output_of(*command: str | Path, check: bool = True, **more: Any) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, timeout=300, **more,
    )  # fmt: skip
    assert result.returncode == 0 or not check, f"{command}:\n{result.stdout}"
    return result.stdout
