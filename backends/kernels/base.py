"""What a kernel generator is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy.typing as npt
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels.builder import BufferSpec, View
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.target import Target
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Expr
from graphopt.program.layout import PLAIN


@dataclass(frozen=True)
class Request:
    """One fused group that wants a kernel.

    Attributes:
        anchor: the node with a generator of its own, or the root of a generic group.
        root: the node whose value the kernel stores.
        nodes: all nodes of the group in order.
        reads: nodes outside the group that its nodes read, constants of one element left out.
        target: what to build for.
        spec: how a node's memory looks.
        constant: the value of a constant node, or None.
        winograd: whether Winograd convolution may be used.
        strassen: whether Strassen's matrix product may be used.
        one_sample: whether all the model's inputs have a first axis of 1, so that no axis is one
            of samples.
        before: the request for what `anchor` reads first, if this kernel is to make that, too.
    """

    anchor: fx.Node
    root: fx.Node
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    target: Target
    spec: Callable[[fx.Node], BufferSpec]
    constant: Callable[[Any], npt.NDArray[Any] | None]
    winograd: bool = True
    strassen: bool = True
    one_sample: bool = False
    before: Request | None = None

    @property
    def call(self) -> Call:
        """The anchor's arguments."""
        return Call(self.anchor)

    @property
    def members(self) -> tuple[fx.Node, ...]:
        """All nodes that the kernel computes, those of `before` among them."""
        return (*(self.before.members if self.before else ()), *self.nodes)

    @property
    def epilogue(self) -> tuple[fx.Node, ...]:
        """The nodes after the anchor."""
        return tuple(node for node in self.nodes if node is not self.anchor)

    @property
    def heavy_epilogue(self) -> bool:
        """Whether the epilogue is too long to be repeated for every accumulator."""
        ops = [OPS[node.target] for node in self.epilogue]
        return len(ops) > 6 or any(op.heavy for op in ops)

    @property
    def fence(self) -> str:
        """`Isa.fence` before a long epilogue, lest LLVM hold its constants in registers that the
        products need; empty before a short one."""
        return self.target.isa.fence if self.heavy_epilogue else ""

    def epilogue_reads(self) -> list[fx.Node]:
        """The nodes the epilogue reads from memory."""
        inside = set(self.nodes)
        found: dict[fx.Node, None] = {}
        for node in self.epilogue:
            for operand in Call(node).operands(OPS[node.target].operands):
                if isinstance(operand, fx.Node) and operand not in inside:
                    found[operand] = None
        return [node for node in found if node in self.reads]

    def reads_without(self, packed: fx.Node) -> list[fx.Node]:
        """What the kernel reads when `packed` is a constant of its own, unless the epilogue reads
        it too."""
        beside = self.epilogue_reads()
        return [node for node in self.reads if node is not packed or node in beside]


@dataclass(frozen=True)
class KernelSource:
    """A kernel ready to be emitted.

    Attributes:
        origin: generator and configuration, for the report.
        tasks: number of independent tasks.
        flops: floating-point operations in all.
        emit: `emit(task, views, constants, out, group, scratch)` emits one task; `views` holds the
            nodes in `reads`, `constants` the flat buffers of `constants`.
        reads: the nodes it takes as parameters.
        constants: packed constants it takes as further parameters.
        scratch: bytes of scratch per thread.
        in_place: nodes whose memory the output may take over, because every element is read only
            by the task, and before the store, that writes the same place.
        own_flops: operations that its algorithm does, where they are others than `flops`.
    """

    origin: str
    tasks: int
    flops: int
    emit: Callable[[Expr, dict[fx.Node, View], list[Any], View, Group, Any], None]
    reads: Sequence[fx.Node]
    constants: Sequence[npt.NDArray[Any]] = field(default_factory=tuple)
    scratch: int = 0
    in_place: Sequence[fx.Node] = ()
    own_flops: int | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to compute a request.

    Attributes:
        name: algorithm and register tile: the origin of the kernel it makes.
        cycles: estimated cycles of one core.
        make: packs the weights and gives the kernel.
    """

    name: str
    cycles: float
    make: Callable[[], KernelSource]


@dataclass(frozen=True)
class Alternatives:
    """The ways to compute a request, which differ in speed and in rounding.

    Attributes:
        key: all of the request that decides how fast each of them is on a given CPU.
        candidates: the one that the cost model takes is the first.
    """

    key: str
    candidates: tuple[Candidate, ...]

    def named(self, name: str | None) -> Candidate | None:
        """The candidate of this name, or None."""
        return next((each for each in self.candidates if each.name == name), None)


Generator = Callable[[Request], KernelSource | Alternatives | None]
"""Answers a request, or None where the generator does not support it."""


def same_place(request: Request, taken: Sequence[fx.Node] = ()) -> list[fx.Node]:
    """Epilogue operands read exactly where the result is stored: candidates to work in place."""
    wanted = request.spec(request.root)
    return [
        node
        for node in request.epilogue_reads()
        if request.spec(node) == wanted and node not in taken
    ]


def collapsible(request: Request, axes: Sequence[int]) -> bool:
    """Whether `axes` of the output can be walked as one.

    They can if every epilogue operand has either all of them or none, and none of them is the
    channel axis of a tensor in blocks.
    """
    tensors = [request.root, *request.epilogue_reads()]
    if 1 in axes and any(request.spec(node).layout != PLAIN for node in tensors):
        return False
    shape = G.shape(request.root)
    rank = len(shape)
    for node in request.epilogue_reads():
        operand = (1,) * (rank - len(G.shape(node))) + G.shape(node)
        extents = [operand[axis] for axis in axes]
        if any(e != 1 for e in extents) and extents != [shape[axis] for axis in axes]:
            return False
    # A node inside may have a smaller shape too; its index would not match then.
    return all(G.shape(node) == shape for node in request.epilogue)


def walked_axis(shape: Sequence[int], axes: Sequence[int]) -> int:
    """The one of `axes` that stands for all when they are walked as one.

    The last that is longer than 1: along the others broadcasting takes every index for 0.
    """
    return next((axis for axis in reversed(axes) if shape[axis] > 1), axes[-1])


def collapse(view: View, shape: Sequence[int], axes: Sequence[int]) -> View:
    """The view with its `axes` (neighbours, aligned to `shape` from the right) made one.

    `walked_axis` gets the whole extent, the others become 1, so indices keep their rank.
    """
    own = view.spec.shape
    offset = len(shape) - len(own)
    mine = [axis - offset for axis in axes if axis >= offset]
    whole = walked_axis(shape, axes) - offset
    if whole not in mine:
        return view
    merged = list(own)
    for axis in mine:
        merged[axis] = 1
    merged[whole] = prod(own[axis] for axis in mine)
    return view.reshaped(tuple(merged))
