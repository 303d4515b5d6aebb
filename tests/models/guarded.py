"""Runs a model with every tensor between pages that may not be touched.

    python -m tests.models.guarded MODEL [CACHE]

CACHE is the size of the last-level cache, in bytes, to build for, if not this machine's.

A kernel that reads or writes one byte too far usually hits other memory of the process and nobody
notices, until on some board there is none. Here it ends the process. Each tensor lies once at the
beginning of its pages and once at their end (up to its 64-byte alignment).
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import graphopt
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.target import host
from graphopt.program.ir import ALIGNMENT, Program
from graphopt.runtime.artifact import build_artifact
from tests.models import zoo

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_KEEP: list[mmap.mmap] = []


class Options(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_uint),
        ("arena", ctypes.c_void_p),
        ("arena_size", ctypes.c_size_t),
    )


class Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


def up(nbytes: int, multiple: int) -> int:
    return -(-nbytes // multiple) * multiple


def spread(program: Program, at_end: bool) -> tuple[Program, list[int]]:
    """Every arena buffer on pages of its own, and the offsets of the pages around them."""
    guards = [0]
    position = PAGE
    buffers = dict(program.buffers)
    for name, buffer in program.buffers.items():
        if buffer.role != "arena" or buffer.within:
            continue
        pages = up(buffer.nbytes, PAGE)
        slack = pages - up(buffer.nbytes, ALIGNMENT) if at_end else 0
        buffers[name] = replace(buffer, offset=position + slack)
        guards.append(position + pages)
        position += pages + PAGE
    for name, buffer in program.buffers.items():
        if buffer.within:
            inside = buffer.offset - program.buffers[buffer.within].offset
            buffers[name] = replace(buffer, offset=buffers[buffer.within].offset + inside)
    return replace(program, buffers=buffers, arena=position), guards


def allocate(nbytes: int) -> int:
    """The address of fresh zeroed pages."""
    _KEEP.append(mmap.mmap(-1, up(nbytes, PAGE)))
    return ctypes.addressof(ctypes.c_char.from_buffer(_KEEP[-1]))


def protect(address: int) -> None:
    if _LIBC.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect")


def guarded_array(shape: tuple[int, ...], dtype: str, at_end: bool) -> np.ndarray:
    """An array with a protected page before and after it."""
    kind = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    pages = up(nbytes, PAGE)
    base = allocate(pages + 2 * PAGE)
    protect(base)
    protect(base + PAGE + pages)
    memory = (ctypes.c_char * nbytes).from_address(base + PAGE + (pages - nbytes) * at_end)
    return np.frombuffer(memory, kind).reshape(shape)


def run(compiled: graphopt.Compiled, kernels: bytes, inputs: zoo.Arrays, at_end: bool) -> None:
    """Run once between guards and compare with the graph in PyTorch."""
    program, guards = spread(compiled.program, at_end)
    name = program.name
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_artifact(program, compiled.target, kernels, Path(folder) / "out")
        library = ctypes.CDLL(str(artifact.library))
    arena_size = library[f"{name}_arena_size"]
    arena_size.restype = ctypes.c_size_t
    size = arena_size(1)
    options = Options(1, allocate(size), size)
    context = ctypes.c_void_p()
    assert library[f"{name}_create"](ctypes.byref(context), ctypes.byref(options)) == 0
    for guard in guards:
        protect(options.arena + guard)

    def tensors(arrays: list[np.ndarray]) -> ctypes.Array[Tensor]:
        return (Tensor * len(arrays))(*[Tensor(a.ctypes.data, a.nbytes) for a in arrays])

    def around(names: tuple[str, ...]) -> list[np.ndarray]:
        buffers = [program.buffers[each] for each in names]
        return [guarded_array(b.shape, b.dtype, at_end) for b in buffers]

    ins, outs = around(program.inputs), around(program.outputs)
    for place, array in zip(ins, inputs.values(), strict=True):
        place[...] = array
    sizes = ctypes.c_size_t(len(ins)), ctypes.c_size_t(len(outs))
    status = library[f"{name}_run"](context, tensors(ins), sizes[0], tensors(outs), sizes[1])
    assert status == 0, status

    with torch.no_grad():
        expected = compiled.graph(*(torch.from_numpy(array) for array in inputs.values()))
    for mine, theirs in zip(outs, expected, strict=True):
        # The same arithmetic in another order: see test_models.py.
        atol = 1e-4 * float(theirs.abs().max())
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=0, atol=atol)


def main() -> None:
    faulthandler.enable()
    entry = zoo.MODELS[sys.argv[1]]
    fixed = entry.kind == "onnx" and not entry.dynamic
    inputs = entry.inputs()
    target = host()
    if len(sys.argv) > 2:
        target = replace(target, last_bytes=int(sys.argv[2]))
    compiled = graphopt.compile(entry.model(), None if fixed else inputs, target=target)
    kernels = compile_kernels(compiled.program, compiled.target)
    for at_end in (False, True):
        run(compiled, kernels, inputs, at_end)


if __name__ == "__main__":
    main()
