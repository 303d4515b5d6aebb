"""Single kernels of a model as programs of their own, to be timed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels.base import Alternatives
from graphopt.backends.lower import Lowering, begin, finish, offer
from graphopt.backends.target import Target
from graphopt.program.ir import Buffer, Program, Step
from graphopt.program.layout import PLAIN
from graphopt.program.partition import NodeGroup

_MOST_COPIES = 16


@dataclass(frozen=True)
class TunableKernel:
    """A kernel of a model that can be made in several ways.

    Attributes:
        gm: the graph that it is part of.
        group: its nodes.
        alternatives: the ways.
        uses: how many steps of the model have one of the same key.
    """

    gm: fx.GraphModule
    group: NodeGroup
    alternatives: Alternatives
    uses: int

    @property
    def origin(self) -> tuple[str, ...]:
        """Where in the model it comes from."""
        return G.merge_origins(self.group.nodes)

    @property
    def cycles(self) -> float:
        """Estimated cycles of all its uses, as the cost model would make it."""
        return self.uses * self.alternatives.candidates[0].cycles


def tunable_kernels(gm: fx.GraphModule, target: Target) -> list[TunableKernel]:
    """The distinct kernels of a graph that there is a choice for, the longest first.

    Raises:
        UnsupportedError: listing every operator without a kernel.
    """
    state = begin(gm, target, "kernel")
    found: dict[str, TunableKernel] = {}
    for group in state.groups():
        made = None if group.alias else offer(state.request(group))
        if isinstance(made, Alternatives) and len(made.candidates) > 1:
            known = found.get(made.key, TunableKernel(state.gm, group, made, 0))
            found[made.key] = replace(known, uses=known.uses + 1)
    return sorted(found.values(), key=lambda kernel: -kernel.cycles)


def lower_alone(kernel: TunableKernel, target: Target, name: str) -> Program:
    """A program of this kernel only, as the candidate of that name.

    What the kernel reads and writes is passed as flat arrays, in the layouts it has in the model.
    The kernel runs several times on copies of its weights: inside a model they would have left the
    cache between two runs, and alone they should, too.
    """
    state = Lowering(kernel.gm, target, "kernel", True, True, lambda _: name)
    for node in state.request(kernel.group).reads:
        if state.value_of(node) is None:
            state.home[node] = state.add_buffer(node.name, state.spec(node), "input")
    root = kernel.group.root
    out = state.add_buffer(root.name, state.spec(root), "output")
    state.lower_group(kernel.group, out)
    state.steps.extend(_copies(state, state.steps[0], target))
    program = finish(state, [out])
    buffers = {
        key: _flat(buffer) if buffer.role in ("input", "output") else buffer
        for key, buffer in program.buffers.items()
    }
    return replace(program, buffers=buffers)


def _copies(state: Lowering, step: Step, target: Target) -> Iterator[Step]:
    """The step again and again on other copies of its constants, until they fill the cache."""
    constants = [name for name in step.reads if state.buffers[name].role == "constant"]
    nbytes = sum(state.buffers[name].nbytes for name in constants)
    if not nbytes:
        return
    for _ in range(1, min(_MOST_COPIES, -(-2 * target.l2_bytes // nbytes))):
        other = {name: name for name in step.args}
        for name in constants:
            serial = len(state.buffers)
            other[name] = f"{name}_copy_{serial}"
            state.buffers[other[name]] = replace(state.buffers[name], name=other[name])
        yield replace(
            step,
            args=tuple(other[name] for name in step.args),
            reads=tuple(other[name] for name in step.reads),
        )


def _flat(buffer: Buffer) -> Buffer:
    itemsize = np.dtype(buffer.dtype).itemsize
    return replace(buffer, shape=(buffer.nbytes // itemsize,), layout=PLAIN)
