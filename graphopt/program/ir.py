"""The Program level: kernels, the buffers they read and write, and the order they run in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

Role = Literal["input", "output", "constant", "arena"]
ALIGNMENT = 64
"""Bytes every arena buffer and every constant is aligned to (one cache line)."""


@dataclass(frozen=True)
class Buffer:
    """One piece of memory.

    Attributes:
        name: unique in the program.
        shape: logical shape, the one the graph knows.
        dtype: numpy name of the element type.
        layout: `plain` (row-major `shape`) or `NCHW8c` and the like (channels in blocks).
        role: who owns the memory: the caller (`input`, `output`), the library (`constant`) or the
            context's arena.
        nbytes: physical size in bytes, padding included.
        offset: bytes from the start of the arena or of the weights; 0 for inputs and outputs.
        data: physical contents of a constant.
        within: the arena buffer it is a piece of.
        sparse: a constant of which a run reads little, here and there (an embedding table).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layout: str
    role: Role
    nbytes: int
    offset: int = 0
    data: npt.NDArray[Any] | None = field(default=None, compare=False, repr=False)
    within: str | None = None
    sparse: bool = False


@dataclass(frozen=True)
class Kernel:
    """One compiled function: `void symbol(T *arg0, …, [float *scratch,] int32 begin, int32 end)`.

    It does the tasks `begin ≤ task < end` of the step; any split of the tasks gives the same
    result, in any order and on any number of threads.

    Attributes:
        symbol: linker name without the library's prefix.
        prim_func: the TVM function (None in tests that bring kernels written in C).
        origin: the generator that made it and its configuration, for the report.
    """

    symbol: str
    prim_func: Any = field(compare=False, repr=False)
    origin: str


@dataclass(frozen=True)
class Step:
    """One call of a kernel.

    Attributes:
        kernel: what to call.
        args: names of the buffers in the order of the kernel's parameters; the last ones are
            `writes`.
        reads: the buffers among `args` that are read.
        writes: the buffers among `args` that are written.
        tasks: number of independent tasks.
        grain: a step of so many tasks at most runs on the caller; of more, there is a chunk for
            each `grain` at most.
        scratch: bytes of scratch memory each thread needs (0: the kernel has no such parameter).
        origin: where in the user's model the work comes from.
        flops: floating-point operations of the whole step (a multiply-add is two).
        own_flops: those that the kernel's algorithm does: of Winograd's there are fewer.
        ops: the graph ops fused into it, for the report.
    """

    kernel: Kernel
    args: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tasks: int
    grain: int = 1
    scratch: int = 0
    origin: tuple[str, ...] = ()
    flops: int = 0
    own_flops: int = 0
    ops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """All a model does at run time.

    Attributes:
        name: the model's name, a C identifier; prefixes every exported symbol.
        steps: run in this order, each after the one before is complete.
        buffers: every buffer by name.
        inputs: names of the caller's input buffers, in model order.
        outputs: names of the caller's output buffers, in model order.
        arena: bytes of the planned arena, without the threads' scratch.
        scratch: bytes of scratch per thread, the largest over the steps, rounded to ALIGNMENT.
        weights: bytes of all constants together.
    """

    name: str
    steps: tuple[Step, ...]
    buffers: Mapping[str, Buffer]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arena: int
    scratch: int
    weights: int
