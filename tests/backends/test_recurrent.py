"""LSTM, GRU and simple recurrent layers against PyTorch running the same operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import fx

from graphopt.backends.lower import lower
from graphopt.backends.target import get_target
from graphopt.errors import UnsupportedError
from graphopt.ops import recurrent
from tests.backends.harness import Builder, aten, check, origins

TOLERANCE = 2e-6
"""Relative to the largest output. A rounding error of a step goes through all later ones; weights
of 1/√H neither let it grow nor die out."""

KINDS = ("lstm", "gru", "gru reset before", "rnn")


def recur(
    b: Builder, kind: str, steps: int, batch: int, hidden: int, *, directions: int = 1,
    reverse: bool = False, states: bool = True, size: float = 1.0,
) -> fx.Node:  # fmt: skip
    """The operator of this kind over random gates, of this size, and weights."""
    name = kind.split()[0]
    rows = recurrent.GATES[name] * hidden
    gates = b.input(b.random(steps, batch, directions * rows) * size)
    weight = b.constant(b.random(directions, rows, hidden) / hidden**0.5)

    def state() -> fx.Node | None:
        return b.input(b.random(directions, batch, hidden)) if states else None

    if name == "lstm":
        functions = ["sigmoid", "tanh", "tanh"]
        return b.op(recurrent.lstm, gates, weight, state(), state(), reverse, functions)
    if name == "rnn":
        return b.op(recurrent.rnn, gates, weight, state(), reverse, ["tanh"])
    after = kind == "gru"
    bias = b.constant(b.random(directions, hidden)) if after else None
    functions = ["sigmoid", "tanh"]
    return b.op(recurrent.gru, gates, weight, bias, state(), reverse, after, functions)


@st.composite
def layers(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kind": draw(st.sampled_from(KINDS)),
        "steps": draw(st.integers(1, 6)),
        "batch": draw(st.sampled_from([1, 1, 2, 3, 7, 13, 30])),
        "hidden": draw(st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 100]))),
        "directions": draw(st.integers(1, 2)),
        "states": draw(st.booleans()),
    }


@settings(max_examples=3, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(layers(), min_size=5, max_size=5), st.integers(0, 2**31))
def test_any_sizes(cases: list[dict[str, Any]], seed: int) -> None:
    b = Builder(seed)
    for case in cases:
        b.returns(recur(b, **case))
    program = check(b, tolerance=TOLERANCE)
    assert set(origins(program)) <= {"lstm", "gru", "rnn"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hidden", [1, 7, 8, 9, 31])
def test_tails(kind: str, hidden: int) -> None:
    b = Builder(hidden)
    for batch in (1, 5):
        b.returns(recur(b, kind, 4, batch, hidden, directions=2))
        b.returns(recur(b, kind, 1, batch, hidden, reverse=True))
    check(b, tolerance=TOLERANCE)


@pytest.mark.parametrize("target", ["x86-64-v2", "cortex-a72"])
def test_other_instruction_sets(target: str) -> None:
    b = Builder(2)
    for kind in KINDS:
        b.returns(recur(b, kind, 3, 1, 21), recur(b, kind, 3, 11, 12, directions=2))
    check(b, target=target, tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_directions_are_tasks(kind: str) -> None:
    """Threads have scratch memory of their own."""
    b = Builder(3)
    b.returns(recur(b, kind, 5, 61, 24, directions=2))
    program = check(b, threads=3, tolerance=TOLERANCE)
    assert program.steps[0].tasks > 2


def test_weights_larger_than_the_cache_are_read_once_for_all_rows() -> None:
    b = Builder(4)
    b.returns(recur(b, "lstm", 2, 25, 390, directions=2), recur(b, "gru", 2, 25, 390))
    program = check(b, threads=2, tolerance=TOLERANCE)
    assert [step.tasks for step in program.steps] == [2, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_gates(kind: str) -> None:
    """Where the functions run into their bounds."""
    b = Builder(5)
    for size in (0.0, 1e-4, 30.0, 1e4):
        b.returns(recur(b, kind, 4, 2, 9, size=size))
    check(b, tolerance=TOLERANCE)


def test_nan_stays_in_its_row() -> None:
    b = Builder(6)
    for kind in KINDS:
        y = recur(b, kind, 3, 4, 9)
        gates = next(x for x, node in zip(b.inputs, _inputs(b), strict=True) if node is y.args[0])
        gates[1, 2, 3] = torch.nan
        b.returns(b.op(aten.isnan.default, y))
    check(b)


def _inputs(b: Builder) -> list[fx.Node]:
    return [node for node in b.gm.graph.nodes if node.op == "placeholder"]


def test_elementwise_operators_behind_it_are_fused() -> None:
    """The next step reads the state as it was before them."""
    b = Builder(7)
    for kind in KINDS:
        y = recur(b, kind, 4, 3, 12, directions=2)
        y = b.op(aten.relu.default, b.op(aten.mul.Tensor, y, b.input(b.random(24))))
        b.returns(b.op(aten.add.Tensor, y, 0.5))
    program = check(b, tolerance=TOLERANCE)
    assert len(program.steps) == len(KINDS)


def test_states_of_zero_are_not_read() -> None:
    b = Builder(8)
    gates = b.input(b.random(3, 2, 20))
    weight = b.constant(b.random(1, 20, 5))
    zero, other = b.constant(torch.zeros(1, 2, 5)), b.constant(b.random(1, 2, 5))
    functions = ["sigmoid", "tanh", "tanh"]
    b.returns(b.op(recurrent.lstm, gates, weight, zero, other, False, functions))
    program = check(b, tolerance=TOLERANCE)
    # The gates, one state and the packed weights.
    assert len(program.steps[0].reads) == 3


def test_other_functions() -> None:
    b = Builder(9)
    gates, weight = b.input(b.random(3, 2, 36)), b.constant(b.random(1, 36, 9) / 3)
    b.returns(b.op(recurrent.lstm, gates, weight, None, None, False, ["relu", "tanh", "sigmoid"]))
    for function in recurrent.ACTIVATIONS:
        gates, weight = b.input(b.random(3, 2, 9)), b.constant(b.random(1, 9, 9) / 3)
        b.returns(b.op(recurrent.rnn, gates, weight, None, False, [function]))
    check(b, tolerance=TOLERANCE)


def test_weights_computed_at_run_time_are_refused() -> None:
    b = Builder(10)
    weight = b.op(aten.relu.default, b.input(b.random(1, 5, 5)))
    gates = b.input(b.random(3, 2, 5))
    b.returns(b.op(recurrent.rnn, gates, weight, None, False, ["tanh"]))
    with pytest.raises(UnsupportedError, match="rnn: its recurrent weight is computed at run time"):
        lower(b.finish(), get_target("host"), "layer")


def test_shapes_that_do_not_fit() -> None:
    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device="meta")

    functions = ["tanh"]
    rnn = recurrent.rnn
    assert rnn(shape(3, 2, 10), shape(2, 5, 5), None, False, functions).shape == (3, 2, 10)
    with pytest.raises(ValueError, match=r"weight is \(2, 6, 5\)"):
        rnn(shape(3, 2, 12), shape(2, 6, 5), None, False, functions)
    with pytest.raises(ValueError, match="gates have 9 columns"):
        rnn(shape(3, 2, 9), shape(2, 5, 5), None, False, functions)
    with pytest.raises(ValueError, match=r"a state is \(2, 3, 5\), not \(2, 2, 5\)"):
        rnn(shape(3, 2, 10), shape(2, 5, 5), shape(2, 3, 5), False, functions)
    with pytest.raises(ValueError, match="only with reset_after"):
        recurrent.gru(shape(3, 2, 15), shape(1, 15, 5), shape(1, 5), None, False, False, functions)
