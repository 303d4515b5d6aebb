"""Building a kernel's PrimFunc: its parameters, its task loop, and buffers read by logical index.

Every kernel is `void symbol(T *buffer…, [float *scratch,] int32 begin, int32 end)` and does the
tasks from `begin` up to `end`. A `View` hides how a buffer is laid out: generators and fused
operators only use logical indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from graphopt.ops.opdef import Expr, Index
from graphopt.program.layout import block_of, physical_shape

_STORED_AS = {"bool": "uint8"}


@dataclass(frozen=True)
class BufferSpec:
    """A kernel parameter: logical shape, dtype (numpy's name) and layout of what it points to."""

    shape: tuple[int, ...]
    dtype: str
    layout: str = "plain"


@dataclass(frozen=True)
class View:
    """A kernel parameter inside the kernel's body."""

    spec: BufferSpec
    buffer: Any

    def place(self, index: Index) -> list[Expr]:
        """Physical index of a logical one."""
        block = block_of(self.spec.layout)
        if block is None:
            return [*index] or [0]
        n, c, *rest = index
        return [n, c // block, *rest, c % block]

    def load(self, index: Index) -> Expr:
        """The element at a logical index; a `bool` buffer gives a TIR bool."""
        element = self.buffer[tuple(self.place(index))]
        return element != 0 if self.spec.dtype == "bool" else element

    def store(self, index: Index, value: Expr) -> None:
        """Emit the store of one element at a logical index."""
        if self.spec.dtype == "bool":
            value = tirx.Cast("uint8", value)
        T.buffer_store(self.buffer, value, self.place(index))

    def reshaped(self, shape: tuple[int, ...]) -> View:
        """The same memory under another logical shape (channels and batch as they were)."""
        spec = BufferSpec(shape, self.spec.dtype, self.spec.layout)
        physical = physical_shape(shape, spec.layout)
        return View(spec, _declare(self.buffer.data, physical, spec.dtype))

    def flat(self) -> View:
        """The same memory as one dimension, for kernels in which the shape does not matter."""
        count = prod(physical_shape(self.spec.shape, self.spec.layout))
        spec = BufferSpec((count,), self.spec.dtype)
        return View(spec, _declare(self.buffer.data, (count,), self.spec.dtype))


@dataclass(frozen=True)
class Part(View):
    """The part of a tensor from a physical index on, which `buffer` holds."""

    begin: tuple[Expr, ...] = ()

    def place(self, index: Index) -> list[Expr]:
        """Physical index, in the part, of a logical one of the whole tensor."""
        whole = super().place(index)
        return [place - first for place, first in zip(whole, self.begin, strict=True)]


def _declare(data: Any, shape: Sequence[int], dtype: str) -> Any:
    return T.decl_buffer(list(shape) or [1], _STORED_AS.get(dtype, dtype), data=data)


def build_kernel(
    symbol: str,
    specs: Sequence[BufferSpec],
    body: Callable[..., None],
    *,
    scratch: bool = False,
) -> Any:
    """Make a PrimFunc.

    Args:
        symbol: its linker name.
        specs: its buffer parameters in order.
        body: `body(task, views[, scratch])` emits one task; `task` is a TIR variable.
        scratch: whether the body also takes a pointer to the thread's scratch memory (float32).
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "tirx.noalias": False})
        pointers = [
            T.arg(f"p{i}", T.handle(_STORED_AS.get(spec.dtype, spec.dtype)))
            for i, spec in enumerate(specs)
        ]
        extra = [T.arg("scratch", T.handle("float32"))] if scratch else []
        begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
        views = [
            View(spec, _declare(pointer, physical_shape(spec.shape, spec.layout), spec.dtype))
            for spec, pointer in zip(specs, pointers, strict=True)
        ]
        with T.serial(begin, end) as task:
            # Tasks are never negative; said so that their divisions stay plain ones.
            body(tirx.max(task, 0), views, *extra)
    return builder.get()


def scratch_parts(places: dict[str, int], scratch: Any) -> dict[str, Any]:
    """A buffer of each part of scratch that is not empty; see `tiling.places_of`."""
    return {
        name: T.decl_buffer((end - start,), "float32", data=scratch, elem_offset=start)
        for (name, start), (_, end) in pairwise(places.items())
        if end > start
    }


def unflatten(flat: Expr, extents: Sequence[int]) -> list[Expr]:
    """Split a flat number into one index per extent, the last running fastest."""
    parts: list[Expr] = []
    for position, extent in reversed(list(enumerate(extents))):
        if extent == 1:
            parts.append(0)
        elif position == 0:
            parts.append(flat)
        else:
            parts.append(flat % extent)
        flat = flat // extent if extent != 1 else flat
    return parts[::-1]


def flatten(index: Sequence[Expr], extents: Sequence[int]) -> Expr:
    """The row-major number of an index."""
    flat: Expr = 0
    for place, extent in zip(index, extents, strict=True):
        flat = flat * extent + place
    return flat


@contextmanager
def loop(extent: int | Expr, kind: str = "serial") -> Iterator[Expr]:
    """A loop from 0; one of constant extent 1 is no loop."""
    if isinstance(extent, int) and extent == 1:
        yield tirx.const(0, "int32")
        return
    make = {"serial": T.serial, "unroll": T.unroll, "vectorized": T.vectorized}[kind]
    with make(0, extent) as variable:
        yield variable


@contextmanager
def only_if(condition: Expr | None) -> Iterator[None]:
    """What is emitted inside runs where the condition holds, or always without one."""
    if condition is None:
        yield
        return
    with T.If(condition), T.Then():
        yield


def interleaved(bodies: Iterable[Callable[[], None]]) -> None:
    """Emit independent bodies of straight-line code in turn, a statement of each at a time.

    Long chains of dependent instructions one after the other fill a processor's queues.
    """
    emitted = []
    for body in bodies:
        with IRBuilder() as builder, T.serial(0, 1):
            body()
        code = builder.get().body
        emitted.append(code.seq if isinstance(code, tirx.SeqStmt) else [code])
    for turn in zip(*emitted, strict=True):
        for statement in turn:
            T.add_to_parent(statement)


def each(extent: int, lanes: int, body: Callable[[Expr], None]) -> None:
    """Run `body` for each place of a row: whole vectors, then the rest one by one."""
    full, rest = divmod(extent, lanes)
    if full:
        with loop(full) as i, loop(lanes, "vectorized") as lane:
            body(i * lanes + lane)
    if rest:
        with loop(rest) as i:
            body(full * lanes + i)


def prefetch(element: Expr, level: int = 2) -> None:
    """Ask for the cache line of a buffer's element, into a level of the caches.

    One outside the buffer does no harm.
    """
    read, locality, data = (tirx.const(value, "int32") for value in (0, 4 - level, 1))
    address = tirx.address_of(element)
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, read, locality, data))


def barrier() -> None:
    """Keep LLVM from moving loads across: an instruction of 64-bit Arm that does nothing."""
    T.evaluate(tirx.call_llvm_intrin("void", "llvm.aarch64.hint", tirx.const(0, "int32")))


def fence(intrinsic: str) -> None:
    """An instruction that no vector register keeps its value across (see `Isa.fence`)."""
    if intrinsic:
        T.evaluate(tirx.call_llvm_intrin("void", intrinsic))


def multiply_add(a: Expr, b: Expr, sum_: Expr, lanes: int) -> Expr:
    """`a · b + sum_` by `Isa.multiply_add`: a number, and two vectors."""
    a = tirx.Broadcast(a, lanes)
    return tirx.call_pure_extern(f"float32x{lanes}", "multiply_add", a, b, sum_)


def f32(value: float) -> Expr:
    """A float32 constant."""
    return tirx.const(value, "float32")
