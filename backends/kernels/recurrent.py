"""LSTM, GRU and simple recurrent layers: what goes from step to step (see `ops/recurrent.py`).

A task takes one direction of some rows of the batch through all steps. Each step multiplies the
rows' states by the packed weights, in the register tiles of `product.py`, and then computes the
gates and the new states, a vector at a time. Sums and states stay in scratch, every gate and state
there as whole vectors, which zeros complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, f32, fence, loop, scratch_parts, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.product import emit_product, span, tile_row
from graphopt.backends.kernels.recurrent_plan import RecurrentPlan, packed, padded, plan
from graphopt.ops import OPS
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr
from graphopt.ops.recurrent import ACTIVATIONS, GATES

_CELL_FLOPS = {"lstm": 9, "gru": 9, "rnn": 2}
"""Operations beside the products, a function counted as one."""


def lower_recurrent(request: Request) -> KernelSource | None:
    """`lstm`, `gru` and `rnn` by constant weights."""
    call = request.call
    name = OPS[request.anchor.target].name
    weight = request.constant(call["weight"])
    if weight is None:
        return None
    steps, batch, _ = call.shape_of("gates")
    directions, _, hidden = weight.shape
    splits = name == "gru" and not call["reset_after"]
    phases = (2, 1) if splits else (GATES[name],)
    chosen = plan(steps, batch, directions, hidden, phases, name == "lstm", request.target)
    bias = call.arguments.get("bias")
    constants = [packed(chosen, weight)]
    if bias is not None:
        value = request.constant(bias)
        if value is None:
            return None
        constants.append(padded(chosen, value).reshape(-1))
    starts = {
        state: node
        for state in ("h", "c")
        if (node := call.arguments.get(f"{state}0")) is not None and not _is_zero(request, node)
    }
    beside = request.epilogue_reads()
    wanted = [call["gates"], *starts.values(), *beside]
    reads = [node for node in request.reads if node in wanted]
    make = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}[name]

    def emit(
        task: Expr, views: dict[fx.Node, View], buffers: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        direction, band = unflatten(task, [directions, chosen.bands.count])
        _Task(chosen, request, buffers, out, group, scratch, direction, band).emit(starts, make)

    rows = steps * batch * directions
    functions = [_CELL_FLOPS[name] * hidden, 2 * chosen.gates * hidden * hidden]
    origin = f"{name} {chosen.panels[0].width}×{chosen.rows}"
    return KernelSource(origin, directions * chosen.bands.count, rows * sum(functions), emit,
                        reads, constants, scratch=chosen.places["end"] * 4)  # fmt: skip


def _is_zero(request: Request, node: fx.Node) -> bool:
    value = request.constant(node)
    return value is not None and not value.any()


class _Task:
    """One direction of some rows."""

    def __init__(
        self, chosen: RecurrentPlan, request: Request, constants: Sequence[Any], out: View,
        group: Group, scratch: Any, direction: Expr, band: Expr,
    ) -> None:  # fmt: skip
        self.plan, self.request, self.constants = chosen, request, constants
        self.call, self.out, self.group, self.direction = request.call, out, group, direction
        self.odd: Expr = 0
        self.functions = [ACTIVATIONS[name][1] for name in self.call["activations"]]
        self.first_tile, self.tiles = span(chosen.bands, band)
        self.buffers = scratch_parts(chosen.places, scratch)

    def emit(self, starts: dict[str, fx.Node], make: Callable[[_Task, Expr], None]) -> None:
        """All steps."""
        chosen = self.plan
        with loop(chosen.gates) as gate, loop(chosen.block, "vectorized") as lane:
            T.buffer_store(self.buffers["tail"], f32(0.0), [gate * chosen.block + lane])
        for state in ("h", "c") if chosen.keeps_cell else ("h",):
            self._start(state, starts.get(state))
        with loop(chosen.steps) as step:
            self.odd = step % 2
            make(self, self._time(step))
        if chosen.keeps_cell:
            self._each_row(self._store_cell)

    def _store_cell(self, row: Expr, n: Expr) -> None:
        with loop(self.plan.hidden) as j:
            self._store("c", row, n, self.plan.steps, j)

    def _time(self, step: Expr) -> Expr:
        """The place of a step in the input."""
        last = self.plan.steps - 1
        if self.plan.directions == 2:
            return step + self.direction * (last - 2 * step)
        return last - step if self.call["reverse"] else step

    def _each_row(self, body: Callable[[Expr, Expr], None]) -> None:
        """`body(row, n)` for each row of scratch, which is row `n` of the batch."""
        chosen = self.plan
        with loop(self.tiles) as t, loop(chosen.rows) as r:
            n = tile_row(self.first_tile + t, chosen.rows, chosen.batch) + r
            body(t * chosen.rows + r, n)

    def _start(self, state: str, node: fx.Node | None) -> None:
        """Put a state's first value, zero without a node, into scratch."""
        chosen, buffer = self.plan, self.buffers[state]

        def fill(row: Expr, n: Expr) -> None:
            with loop(chosen.width // chosen.block) as v, loop(chosen.block, "vectorized") as lane:
                T.buffer_store(buffer, f32(0.0), [row * chosen.width + v * chosen.block + lane])
            if node is not None:
                with loop(chosen.hidden) as j:
                    value = self.group.read(node, (self.direction, n, j))
                    T.buffer_store(buffer, value, [row * chosen.width + j])

        self._each_row(fill)

    def multiply(self, phase: int, source: str) -> None:
        """The sums of a phase's gates: a state in scratch times the weights."""
        chosen, panels = self.plan, self.plan.panels[phase]
        sizes = [each.size for each in chosen.panels]
        base = self.direction * sum(sizes) + sum(sizes[:phase])
        first_gate, width = sum(chosen.phases[:phase]), chosen.width
        count, depth = panels.columns // panels.width, panels.depth
        turns = chosen.rows == 1 and panels.columns % panels.width == 0

        def turned(number: Expr, total: int) -> Expr:
            """A single row reads its weights forth and back: what it has read last is still in the
            first-level cache."""
            return number + self.odd * (total - 1 - 2 * number) if turns else number

        def right(panel: Expr, k: Expr, column: Expr) -> Expr:
            place = panels.inside(turned(panel, count), turned(k, depth), column)
            return self.constants[0][base + place]

        def left(t: Expr, r: int, k: Expr) -> Expr:
            return self.buffers[source][(t * chosen.rows + r) * width + turned(k, depth)]

        def store(t: Expr, r: int, first: Expr, lanes: int, value: Callable[[Expr], Expr]) -> None:
            row = (t * chosen.rows + r) * chosen.gates + first_gate
            column = turned(first // panels.width, count) * panels.width + first % panels.width
            with loop(lanes, "vectorized") as lane:
                T.buffer_store(self.buffers["sums"], value(lane), [row * width + column + lane])

        emit_product(panels, right, chosen.rows, self.tiles, left, store, by_lane=chosen.by_lane)
        fence(chosen.fence)

    def update(self, t: Expr, gates: range, cell: Callable[[_Vector], None], *,
               result: bool = True) -> None:  # fmt: skip
        """Compute states, a vector at a time.

        Args:
            t: the place of the step in the input.
            gates: those that `cell` asks the input for.
            cell: emits the computation of one vector.
            result: whether the state `h` is ready then.
        """
        chosen = self.plan
        full, rest = divmod(chosen.hidden, chosen.block)

        def x(n: Expr, gate: int, j: Expr) -> Expr:
            column = (self.direction * chosen.gates + gate) * chosen.hidden + j
            return self.group.read(self.call["gates"], (t, n, column))

        def one(row: Expr, n: Expr) -> None:
            if full:
                with loop(full) as v, loop(chosen.block, "vectorized") as lane:
                    j = v * chosen.block + lane
                    cell(_Vector(self, row, j, lambda gate: x(n, gate, j)))
                    if result:
                        self._store("h", row, n, t, j)
            if not rest:
                return
            first, tail = full * chosen.block, self.buffers["tail"]
            for gate in gates:
                with loop(rest) as j:
                    T.buffer_store(tail, x(n, gate, first + j), [gate * chosen.block + j])
            with loop(chosen.block, "vectorized") as lane:
                cell(_Vector(self, row, first + lane,
                             lambda gate: tail[gate * chosen.block + lane]))  # fmt: skip
            if result:
                with loop(rest) as j:
                    self._store("h", row, n, t, first + j)

        self._each_row(one)

    def _store(self, state: str, row: Expr, n: Expr, t: Expr, j: Expr) -> None:
        """Store one number of a state to row `t` of the result."""
        value = self.buffers[state][row * self.plan.width + j]
        index = (t, n, self.direction * self.plan.hidden + j)
        self.group.give(self.request.anchor, lambda _: value)
        self.out.store(index, self.group.read(self.request.root, index))


@dataclass(frozen=True)
class _Vector:
    """Where a cell computes: a row, and units `j` of it.

    Attributes:
        x: what the input gives a gate.
    """

    task: _Task
    row: Expr
    j: Expr
    x: Callable[[int], Expr]

    def _place(self, gate: int) -> list[Expr]:
        return [(self.row * self.task.plan.gates + gate) * self.task.plan.width + self.j]

    def sum(self, gate: int) -> Expr:
        """What the state gives a gate, or what was kept for it."""
        return self.task.buffers["sums"][tuple(self._place(gate))]

    def keep_gate(self, gate: int, value: Expr) -> None:
        """Keep a gate in place of its sum, for the next phase."""
        T.buffer_store(self.task.buffers["sums"], value, self._place(gate))

    def state(self, name: str) -> Expr:
        """A part of a state in scratch."""
        return self.task.buffers[name][self.row * self.task.plan.width + self.j]

    def keep(self, name: str, value: Expr) -> None:
        """Store the same."""
        T.buffer_store(self.task.buffers[name], value, [self.row * self.task.plan.width + self.j])

    def constant(self) -> Expr:
        """The bias of the state's part of a GRU's new gate; 0 without one."""
        task = self.task
        if len(task.constants) == 1:
            return f32(0.0)
        return task.constants[1][task.direction * task.plan.width + self.j]


def _lstm(task: _Task, t: Expr) -> None:
    to_gate, to_cell, to_state = task.functions
    task.multiply(0, "h")

    def cell(at: _Vector) -> None:
        i, f, g, o = (at.sum(gate) + at.x(gate) for gate in range(4))
        at.keep_gate(3, to_gate(o))
        at.keep("c", to_gate(f) * at.state("c") + to_gate(i) * to_cell(g))

    def state(at: _Vector) -> None:
        at.keep("h", at.sum(3) * to_state(at.state("c")))

    # One after the other they would be a chain twice as long, of which fewer fit the queues.
    task.update(t, range(4), cell, result=False)
    task.update(t, range(0), state)


def _gru(task: _Task, t: Expr) -> None:
    to_gate, to_new = task.functions
    after = bool(task.call["reset_after"])

    def gates(at: _Vector) -> None:
        r, z = (M.share(to_gate(at.sum(gate) + at.x(gate))) for gate in range(2))
        at.keep_gate(1, z)
        if after:
            at.keep_gate(2, r * (at.sum(2) + at.constant()))
        else:
            at.keep("reset", r * at.state("h"))

    def state(at: _Vector) -> None:
        z, new = at.sum(1), M.share(to_new(at.sum(2) + at.x(2)))
        at.keep("h", new + z * (at.state("h") - new))

    task.multiply(0, "h")
    task.update(t, range(2), gates, result=False)
    if not after:
        task.multiply(1, "reset")
    task.update(t, range(2, 3), state)


def _rnn(task: _Task, t: Expr) -> None:
    (function,) = task.functions
    task.multiply(0, "h")
    task.update(t, range(1), lambda at: at.keep("h", function(at.sum(0) + at.x(0))))
