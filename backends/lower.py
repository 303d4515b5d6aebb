"""Graph → Program: layouts, groups, kernels, and one planned arena."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import tvm_ffi
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels import GENERATORS
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import BufferSpec, build_kernel
from graphopt.backends.kernels.fusion import TIR_DTYPES, Group
from graphopt.backends.kernels.generic_lower import lower_map, lower_reduction
from graphopt.backends.target import Target
from graphopt.errors import UnsupportedError
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Kind
from graphopt.program.ir import ALIGNMENT, Buffer, Kernel, Program, Role, Step
from graphopt.program.layout import PLAIN, physical_size
from graphopt.program.layouts import assign_layouts
from graphopt.program.memory import Lifetime, plan_offsets, round_up
from graphopt.program.partition import NodeGroup, partition, tensor_operands

_SERIAL_WORK = 50_000
"""Operations below which handing work to another thread costs more than it saves."""


def check_supported(gm: fx.GraphModule) -> None:
    """Raise one error that lists every node graphopt has no kernel for.

    Raises:
        UnsupportedError: with the reason and the origin of each.
    """
    problems: list[str] = []
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        where = "; ".join(G.origin(node)) or node.name
        op = OPS.get(node.target)
        if op is None:
            problems.append(f"{_op_name(node)}: no such operator in graphopt ({where})")
            continue
        dtypes = [G.value(n).dtype for n in (node, *tensor_operands(node))]
        strange = [str(d) for d in dtypes if d not in TIR_DTYPES]
        reason = op.check(Call(node)) if op.check and not strange else None
        if strange:
            reason = f"dtype {strange[0]} is not supported"
        if reason is None and any(n.op == "get_attr" for n in ()):
            continue
        if reason:
            problems.append(f"{op.name}: {reason} ({where})")
    if problems:
        raise UnsupportedError(
            f"the model uses {len(problems)} operator call(s) graphopt cannot compile",
            where=problems,
            hint="rewrite these parts of the model, or ask for the operators; "
            "CONTRIBUTING.md shows how one is added.",
        )


def _op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "name", lambda: node.target)())


class _Lowering:
    """State of one lowering: buffers, kernels and steps so far."""

    def __init__(self, gm: fx.GraphModule, target: Target, name: str) -> None:
        self.gm = gm
        self.target = target
        self.name = name
        self.layouts = assign_layouts(gm, target.isa.block)
        self.buffers: dict[str, Buffer] = {}
        self.home: dict[fx.Node, str] = {}
        self.steps: list[Step] = []
        self.kernels: dict[int, list[tuple[Any, Kernel]]] = {}
        self.serials: dict[str, int] = {}
        self.in_place: dict[str, str] = {}
        self.constants: dict[bytes, str] = {}

    # Buffers

    def spec(self, node: fx.Node) -> BufferSpec:
        """How the node's memory looks."""
        return BufferSpec(
            G.shape(node), TIR_DTYPES[G.value(node).dtype], self.layouts.get(node, PLAIN)
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

    def lower_group(self, group: NodeGroup, destination: str | None) -> None:
        """Make the group's kernel and its step."""
        request = self.request(group)
        source = self.choose(request)
        reads = [self.locate(node) for node in source.reads]
        constants = [self.add_constant("packed", data) for data in source.constants]
        root = group.root
        out = destination or self.add_buffer(root.name, self.spec(root), "arena")
        self.home[root] = out
        kernel = self.kernel(request, source)
        grain = source.tasks
        if source.flops + physical_size(G.shape(root), PLAIN, 1) > _SERIAL_WORK:
            per_task = max(1, source.flops // source.tasks)
            grain = max(1, min(source.tasks, _SERIAL_WORK // per_task))
        for node in source.in_place:
            home = self.locate(node)
            if self.buffers[home].role == "arena" and self.buffers[out].role == "arena":
                self.in_place.setdefault(out, home)
        self.steps.append(
            Step(
                kernel=kernel,
                args=(*reads, *constants, out),
                reads=(*dict.fromkeys((*reads, *constants)),),
                writes=(out,),
                tasks=source.tasks,
                grain=grain,
                scratch=source.scratch,
                origin=G.merge_origins(group.nodes),
                flops=source.flops,
                ops=tuple(OPS[node.target].name for node in group.nodes),
            )
        )

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
        )

    def scalar(self, node: fx.Node) -> bool | int | float | None:
        """The value of a constant of one element."""
        data = self.value_of(node)
        return data.reshape(-1)[0].item() if data is not None and data.size == 1 else None

    def choose(self, request: Request) -> KernelSource:
        """The first generator that takes the request."""
        op = OPS[request.anchor.target]
        for generator in GENERATORS.get(op.name, ()):
            source = generator(request)
            if source is not None:
                return source
        if op.kind is Kind.REDUCTION:
            return lower_reduction(request)
        if op.kind is Kind.ANCHOR:
            raise UnsupportedError(
                f"no kernel for {op.name} with these shapes and constants",
                where=G.origin(request.anchor),
                hint="weights must be constants and matrices have at least two dimensions.",
            )
        return lower_map(request)

    def kernel(self, request: Request, source: KernelSource) -> Kernel:
        """Emit the kernel, or find one that is the same."""
        scalars = {
            operand: value
            for node in request.nodes
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


def lower(gm: fx.GraphModule, target: Target, name: str) -> Program:
    """Lower a verified graph to a Program for a target.

    Raises:
        UnsupportedError: listing every operator without a kernel.
    """
    check_supported(gm)
    outputs = list(G.outputs(gm))
    _copy_returned_interface(gm, outputs)
    outputs = list(G.outputs(gm))
    state = _Lowering(gm, target, name)
    for node, label in zip(G.placeholders(gm), gm.meta["input_names"], strict=True):
        state.home[node] = state.add_buffer(label, state.spec(node), "input")
    output_names: dict[fx.Node, str] = {}
    for node, label in zip(outputs, gm.meta["output_names"], strict=True):
        spec = BufferSpec(G.shape(node), TIR_DTYPES[G.value(node).dtype])
        output_names[node] = state.add_buffer(label, spec, "output")
    groups = partition(gm, state.layouts)
    for group in groups:
        if group.alias:
            source = tensor_operands(group.root)[0]
            state.home[group.root] = state.locate(source)
            continue
        state.lower_group(group, output_names.get(group.root))
    return _finish(state, [output_names[node] for node in outputs])


def _copy_returned_interface(gm: fx.GraphModule, outputs: list[fx.Node]) -> None:
    """Give every output a node of its own that a kernel writes to the caller's memory.

    Inputs, constants, views and values returned twice are returned through a copy.
    """
    seen: set[fx.Node] = set()
    fresh: list[fx.Node] = []
    out_node = G.output_node(gm)
    for node in outputs:
        view = node.op == "call_function" and OPS[node.target].kind is Kind.VIEW
        if node.op == "call_function" and not view and node not in seen:
            seen.add(node)
            fresh.append(node)
            continue
        with gm.graph.inserting_before(out_node):
            rank = len(G.shape(node))
            copy = G.call(
                gm.graph, torch.ops.aten.permute.default, (node, list(range(rank))),
                origin=G.origin(node) or (f"output of {node.name}",),
            )  # fmt: skip
        fresh.append(copy)
    out_node.args = (tuple(fresh),)
    gm.recompile()


def _finish(state: _Lowering, outputs: list[str]) -> Program:
    """Place constants and arena tensors and assemble the Program."""
    buffers = state.buffers
    lifetimes = _lifetimes(state)
    owners = _merge_in_place(state, lifetimes)
    offsets, arena = plan_offsets([life for name, life in lifetimes.items() if owners[name] == name])
    for name in lifetimes:
        buffers[name] = replace(buffers[name], offset=offsets[owners[name]])
    weights = 0
    for name, buffer in buffers.items():
        if buffer.role == "constant":
            buffers[name] = replace(buffer, offset=weights)
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


def _lifetimes(state: _Lowering) -> dict[str, Lifetime]:
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, step in enumerate(state.steps):
        for name in step.args:
            if state.buffers[name].role == "arena":
                first.setdefault(name, i)
                last[name] = i
    return {
        name: Lifetime(name, state.buffers[name].nbytes, first[name], last[name]) for name in first
    }


def _merge_in_place(state: _Lowering, lifetimes: dict[str, Lifetime]) -> dict[str, str]:
    """Let a step's output take over the memory of an operand that dies there.

    Changes `lifetimes` of the first owner to the union; gives each tensor's owner.
    """
    owners = {name: name for name in lifetimes}
    for out, source in state.in_place.items():
        if out not in lifetimes or source not in lifetimes:
            continue
        owner = owners[source]
        ends = lifetimes[source].last == lifetimes[out].first
        if not ends or lifetimes[owner].last != lifetimes[source].last:
            continue
        owners[out] = owner
        life = lifetimes[owner]
        lifetimes[owner] = replace(life, last=max(life.last, lifetimes[out].last))
    return owners


def live_bytes(program: Program) -> int:
    """The largest sum of arena bytes needed at one step, working in place not counted."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        for name in step.args:
            if program.buffers[name].role == "arena":
                first.setdefault(name, i)
                last[name] = i
    return max(
        (
            sum(b.nbytes for n, b in program.buffers.items() if n in first and first[n] <= i <= last[n])
            for i in range(len(program.steps))
        ),
        default=0,
    )


def describe_layouts(layouts: Mapping[fx.Node, str]) -> dict[str, int]:
    """How many tensors have each layout."""
    counts: dict[str, int] = {}
    for layout in layouts.values():
        counts[layout] = counts.get(layout, 0) + 1
    return counts


__all__ = ["check_supported", "live_bytes", "lower", "prod"]
