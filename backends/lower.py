"""Graph → Program: layouts, groups, kernels, and one planned arena."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels import GENERATORS, expand
from graphopt.backends.kernels.base import Alternatives, KernelSource, Request
from graphopt.backends.kernels.builder import BufferSpec, build_kernel
from graphopt.backends.kernels.conv_layout import wants_blocks
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.generic_lower import lower_map, lower_reduction
from graphopt.backends.supported import check_supported
from graphopt.backends.target import Target
from graphopt.errors import UnsupportedError
from graphopt.ops import OPS
from graphopt.ops.opdef import Kind
from graphopt.ops.scalar import TIR_NAMES
from graphopt.program.ir import ALIGNMENT, Buffer, Kernel, Program, Role, Step
from graphopt.program.layout import PLAIN, physical_size
from graphopt.program.layouts import Wants, assign_layouts, makes_blocks
from graphopt.program.memory import Lifetime, largest_live, lifetimes_of, plan_offsets, round_up
from graphopt.program.outputs import with_own_outputs
from graphopt.program.padding import write_padding
from graphopt.program.partition import NodeGroup, join_pairs, partition, tensor_operands
from graphopt.program.pieces import plan_pieces
from graphopt.program.tables import is_table

TUNED = " (tuned)"
"""Behind the origin of a kernel that was not left to the cost model."""
_SERIAL_WORK = 50_000
"""Operations below which handing work to another thread costs more than it saves."""
_ELEMENT = 10
"""Operations that could be done while an element of a result is brought and stored."""


Choice = Callable[[Alternatives], str | None]
"""Names the candidate to take; None, or a name that there is not, leaves it to the cost model."""


def by_cost(_: Alternatives) -> str | None:
    """Always leaves it to the cost model."""
    return None


def _wants(gm: fx.GraphModule, target: Target, winograd: bool, strassen: bool) -> Wants:
    """`wants_blocks` of nodes of the graph, remembered."""
    return cache(partial(wants_blocks, gm, target=target, winograd=winograd, strassen=strassen))


class Lowering:
    """State of one lowering: buffers, kernels and steps so far."""

    def __init__(
        self, gm: fx.GraphModule, target: Target, name: str, winograd: bool, strassen: bool,
        choice: Choice,
    ) -> None:  # fmt: skip
        """Nothing is lowered yet."""
        self.gm = gm
        self.choice = choice
        self.target = target
        self.name = name
        self.winograd = winograd
        self.strassen = strassen
        self.one_sample = all(G.shape(node)[:1] in ((), (1,)) for node in G.placeholders(gm))
        self.layouts = assign_layouts(gm, target.isa.block, _wants(gm, target, winograd, strassen))
        self.pieces = plan_pieces(gm, self.layouts)
        self.buffers: dict[str, Buffer] = {}
        self.home: dict[fx.Node, str] = {}
        self.steps: list[Step] = []
        self.kernels: dict[int, list[tuple[Any, Kernel]]] = {}
        self.serials: dict[str, int] = {}
        self.in_place: dict[str, list[str]] = {}
        self.constants: dict[bytes, str] = {}

    # Buffers

    def spec(self, node: fx.Node) -> BufferSpec:
        """How the node's memory looks."""
        return BufferSpec(
            G.shape(node), TIR_NAMES[G.value(node).dtype], self.layouts.get(node, PLAIN)
        )

    def add_buffer(self, stem: str, spec: BufferSpec, role: Role) -> str:
        """Register a new buffer and give its unique name."""
        name = stem
        while name in self.buffers:
            self.serials[stem] = self.serials.get(stem, 0) + 1
            name = f"{stem}_{self.serials[stem]}"
        itemsize = np.dtype(spec.dtype).itemsize
        nbytes = physical_size(spec.shape, spec.layout, itemsize)
        self.buffers[name] = Buffer(name, spec.shape, spec.dtype, spec.layout, role, nbytes)
        return name

    def add_constant(self, stem: str, data: npt.NDArray[Any]) -> str:
        """Register constant data; equal data is stored once."""
        data = np.ascontiguousarray(data)
        key = f"{data.dtype}{data.shape}".encode() + data.tobytes()
        if key not in self.constants:
            spec = BufferSpec(data.shape, str(data.dtype))
            name = self.add_buffer(stem, spec, "constant")
            self.buffers[name] = replace(self.buffers[name], data=data)
            self.constants[key] = name
        return self.constants[key]

    def add_arena(self, node: fx.Node) -> str:
        """Register the buffer of a computed tensor, a piece of another where it belongs there."""
        if node in self.home:
            return self.home[node]
        self.home[node] = name = self.add_buffer(node.name, self.spec(node), "arena")
        if node in self.pieces.within:
            holder, offset = self.pieces.within[node]
            within = self.add_arena(holder)
            self.buffers[name] = replace(self.buffers[name], within=within, offset=offset)
        return name

    def value_of(self, node: Any) -> npt.NDArray[Any] | None:
        """A constant node's value."""
        tensor = G.constant(self.gm, node)
        return None if tensor is None else tensor.detach().cpu().contiguous().numpy()

    def locate(self, node: fx.Node) -> str:
        """The buffer that holds a node's value."""
        if node not in self.home:
            data = self.value_of(node)
            assert data is not None, f"{node.name} has no buffer"
            self.home[node] = self.add_constant(node.name, data)
        return self.home[node]

    # Steps

    def groups(self) -> list[NodeGroup]:
        """What becomes kernels, names and pieces, in an order in which they can run."""
        groups = partition(self.gm, self.layouts, self.pieces.unmoved)
        return join_pairs(
            groups, G.outputs(self.gm),
            lambda first, second: expand.pays(self.request(first), self.request(second)),
        )  # fmt: skip

    def lower_group(self, group: NodeGroup, destination: str | None) -> None:
        """Make the group's kernel and its step."""
        request = self.request(group)
        source = self.choose(request)
        reads = [self.locate(node) for node in source.reads]
        constants = [self.add_constant("packed", data) for data in source.constants]
        root = group.root
        out = destination or self.add_arena(root)
        self.home[root] = out
        kernel = self.kernel(request, source)
        work = source.flops + _ELEMENT * physical_size(G.shape(root), PLAIN, 1)
        grain = -(-source.tasks * _SERIAL_WORK // max(1, work))
        self.in_place[out] = [
            self.locate(node) for node in source.in_place if self.read_once(node, source)
        ]
        self.steps.append(
            Step(
                kernel=kernel,
                args=(*reads, *constants, out),
                reads=(*dict.fromkeys((*reads, *constants)),),
                writes=(out,),
                tasks=source.tasks,
                grain=min(source.tasks, grain),
                scratch=source.scratch,
                origin=G.merge_origins(request.members),
                flops=source.flops,
                own_flops=source.flops if source.own_flops is None else source.own_flops,
                ops=tuple(OPS[node.target].name for node in request.members),
            )
        )

    def read_once(self, node: fx.Node, source: KernelSource) -> bool:
        """Whether the kernel reads the node's memory under no other name (a view, say)."""
        home = self.locate(node)
        return all(other is node or self.locate(other) != home for other in source.reads)

    def request(self, group: NodeGroup) -> Request:
        """What the group asks of a generator."""
        inside = set(group.nodes)
        outside = dict.fromkeys(
            operand
            for node in group.nodes
            for operand in tensor_operands(node)
            if operand not in inside and self.scalar(operand) is None
        )
        return Request(
            anchor=group.anchor or group.root,
            root=group.root,
            nodes=tuple(group.nodes),
            reads=tuple(outside),
            target=self.target,
            spec=self.spec,
            constant=self.value_of,
            winograd=self.winograd,
            strassen=self.strassen,
            one_sample=self.one_sample,
            before=None if group.before is None else self.request(group.before),
        )

    def scalar(self, node: fx.Node) -> bool | int | float | None:
        """The value of a constant of one element."""
        data = self.value_of(node)
        return data.reshape(-1)[0].item() if data is not None and data.size == 1 else None

    def choose(self, request: Request) -> KernelSource:
        """The first generator that takes the request."""
        made = offer(request)
        if isinstance(made, Alternatives):
            return self.take(made)
        if made is not None:
            return made
        op = OPS[request.anchor.target]
        if op.kind is Kind.REDUCTION:
            return lower_reduction(request)
        if op.kind is Kind.ANCHOR:
            raise UnsupportedError(
                f"no kernel for {op.name} with these shapes and constants",
                where=G.origin(request.anchor),
                hint="weights must be constants and matrices have at least two dimensions.",
            )
        return lower_map(request)

    def take(self, alternatives: Alternatives) -> KernelSource:
        """The candidate of the choice, or the cost model's."""
        chosen = alternatives.named(self.choice(alternatives))
        if chosen is None:
            return alternatives.candidates[0].make()
        return replace(chosen.make(), origin=f"{chosen.name}{TUNED}")

    def kernel(self, request: Request, source: KernelSource) -> Kernel:
        """Emit the kernel, or find one that is the same."""
        scalars = {
            operand: value
            for node in request.members
            for operand in tensor_operands(node)
            if (value := self.scalar(operand)) is not None
        }
        specs = [
            *(self.spec(node) for node in source.reads),
            *(BufferSpec(c.shape, str(c.dtype)) for c in source.constants),
            self.spec(request.root),
        ]

        def body(task: Any, views: list[Any], *scratch: Any) -> None:
            count = len(source.reads)
            by_node = dict(zip(source.reads, views[:count], strict=True))
            constants = [view.buffer for view in views[count:-1]]
            group = Group(by_node, scalars)
            source.emit(task, by_node, constants, views[-1], group, *(scratch or (None,)))

        func = build_kernel("kernel", specs, body, scratch=source.scratch > 0)
        digest = tvm_ffi.structural_hash(func)
        for other, kernel in self.kernels.setdefault(digest, []):
            if tvm_ffi.structural_equal(other, func):
                return kernel
        stem = source.origin.split()[0]
        serial = self.serials[stem] = self.serials.get(stem, 0) + 1
        kernel = Kernel(f"{stem}_{serial}", func, source.origin)
        self.kernels[digest].append((func, kernel))
        return kernel


def offer(request: Request) -> KernelSource | Alternatives | None:
    """What the first generator that takes the request answers; None if none takes it."""
    for generator in GENERATORS.get(OPS[request.anchor.target].name, ()):
        made = generator(request)
        if made is not None:
            return made
    return None


def lower(
    gm: fx.GraphModule,
    target: Target,
    name: str,
    *,
    winograd: bool = True,
    strassen: bool = True,
    choice: Choice = by_cost,
) -> Program:
    """Lower a verified graph to a Program for a target.

    Args:
        gm: the graph; it is not changed.
        target: what to build for.
        name: the library's name.
        winograd: whether convolutions may be computed by Winograd's algorithm.
        strassen: whether matrix products may be computed by Strassen's algorithm.
        choice: chooses where a kernel can be made in several ways.

    Raises:
        UnsupportedError: listing every operator without a kernel.
    """
    state = begin(gm, target, name, winograd, strassen, choice)
    gm = state.gm
    outputs = list(G.outputs(gm))
    for node, label in zip(G.placeholders(gm), gm.meta["input_names"], strict=True):
        state.home[node] = state.add_buffer(label, state.spec(node), "input")
    output_names: dict[fx.Node, str] = {}
    for node, label in zip(outputs, gm.meta["output_names"], strict=True):
        spec = BufferSpec(G.shape(node), TIR_NAMES[G.value(node).dtype])
        output_names[node] = state.add_buffer(label, spec, "output")
    for group in state.groups():
        if group.root in state.pieces.unmoved:
            state.add_arena(group.root)
            continue
        if group.alias:
            source = tensor_operands(group.root)[0]
            state.home[group.root] = state.locate(source)
            continue
        state.lower_group(group, output_names.get(group.root))
    return finish(state, [output_names[node] for node in outputs])


def begin(
    gm: fx.GraphModule, target: Target, name: str, winograd: bool = True, strassen: bool = True,
    choice: Choice = by_cost,
) -> Lowering:  # fmt: skip
    """The lowering of a copy of the graph, of which nothing is lowered yet; see `lower`."""
    check_supported(gm)
    wants = _wants(gm, target, winograd, strassen)
    gm = with_own_outputs(gm, lambda node: makes_blocks(node, wants))
    write_padding(gm)
    return Lowering(gm, target, name, winograd, strassen, choice)


def finish(state: Lowering, outputs: list[str]) -> Program:
    """Place constants and arena tensors and assemble the Program."""
    buffers = state.buffers
    lifetimes = lifetimes_of(state.steps, buffers)
    owners = _merge_in_place(state, lifetimes)
    offsets, arena = plan_offsets(
        [life for name, life in lifetimes.items() if owners[name] == name]
    )
    for name in lifetimes:
        buffers[name] = replace(buffers[name], offset=offsets[owners[name]])
    for name, buffer in buffers.items():
        if buffer.within is not None:
            offset = buffers[buffer.within].offset + buffer.offset
            buffers[name] = replace(buffer, offset=offset)
    tables = {home for node, home in state.home.items() if is_table(node)}
    weights = 0
    for name, buffer in buffers.items():
        if buffer.role == "constant":
            buffers[name] = replace(buffer, offset=weights, sparse=name in tables)
            # One more line of zeros: kernels may read a whole vector at the last element.
            weights += round_up(buffer.nbytes)
    if weights:
        weights += ALIGNMENT
    return Program(
        name=state.name,
        steps=tuple(state.steps),
        buffers=buffers,
        inputs=tuple(name for name, b in buffers.items() if b.role == "input"),
        outputs=tuple(outputs),
        arena=arena + (ALIGNMENT if arena else 0),
        scratch=round_up(max((step.scratch for step in state.steps), default=0)),
        weights=weights,
    )


def _merge_in_place(state: Lowering, lifetimes: dict[str, Lifetime]) -> dict[str, str]:
    """Let a step's output take over the memory of an operand that dies there.

    Changes `lifetimes` of the first owner to the union; gives each tensor's owner.
    """
    owners = {name: name for name in lifetimes}
    holders = {buffer.within for buffer in state.buffers.values()}

    def dies(source: str, out: str) -> bool:
        owner = lifetimes[owners[source]]
        return owner.last == lifetimes[source].last == lifetimes[out].first

    for out, candidates in state.in_place.items():
        for source in candidates:
            if out not in lifetimes or source not in lifetimes or source in holders:
                continue
            if not dies(source, out):
                continue
            owner = lifetimes[owners[source]]
            if lifetimes[out].nbytes <= owner.nbytes:
                owners[out] = owner.name
                lifetimes[owner.name] = replace(owner, last=lifetimes[out].last)
                break
    return owners


def live_bytes(program: Program) -> int:
    """The largest sum of arena bytes needed at one step, working in place not counted."""
    return largest_live(list(lifetimes_of(program.steps, program.buffers).values()))
