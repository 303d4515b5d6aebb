"""LSTM, GRU and the simple recurrent layer: the part of them that goes from step to step.

What a layer computes of its inputs does not depend on its state: the importers make it one product
for all steps. The operators here take that (`gates`) and do the rest, for one direction or for
both. They belong to `torch.library`, so that a graph with them runs in PyTorch; gradients do not
pass through them.

Shapes, for T steps, a batch of N, D directions (1 or 2) and a state of H numbers; all float32:

- `gates` [T, N, D·G·H], G gates of each direction: input, forget, cell and output of an LSTM (4),
  reset, update and new of a GRU (3), 1 of a simple layer. Biases are in it.
- `weight` [D, G·H, H]: what the state is multiplied with, gates in the same order.
- `bias` [D, H] of a GRU: added to the state's part of the new gate before the reset gate is
  multiplied with it, which is with `reset_after` only.
- `h0`, `c0` [D, N, H]: states before the first step; zeros if None.
- `reverse`: the one direction goes from the last step to the first. Of two, the second one does.
- `activations`: names out of `ACTIVATIONS`, in ONNX's order.

The result is [T, N, D·H], the state after each step, at the step's place in the input. An LSTM
gives [T + 1, N, D·H], whose last row is the cell's state in the end.

Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; Cho et al., "Learning Phrase
Representations using RNN Encoder-Decoder", 2014.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from tvm import tirx

from graphopt.ops import activation
from graphopt.ops import math as m
from graphopt.ops.opdef import Call, Expr, Kind, OpDef, Sample

NAMES = ("lstm", "gru", "rnn")

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Expr], Expr]]] = {
    "sigmoid": (torch.sigmoid, activation.sigmoid),
    "tanh": (torch.tanh, m.tanh),
    "relu": (torch.relu, m.relu),
    "hardsigmoid": (
        lambda x: torch.clamp(0.2 * x + 0.5, 0, 1),
        lambda x: m.at_least(m.at_most(x * m.const(0.2) + m.const(0.5), 1.0), 0.0),
    ),
    "softsign": (
        torch.nn.functional.softsign,
        lambda x: x / (m.const(1.0) + tirx.abs(x)),
    ),
}
"""Each as PyTorch computes it, and as kernels do. The hard sigmoid is ONNX's, and Keras's."""

GATES = {"lstm": 4, "gru": 3, "rnn": 1}

_library: Any = torch.library.Library
_LIBRARY: Any = _library("graphopt", "FRAGMENT")
_LIBRARY.define(
    "lstm(Tensor gates, Tensor weight, Tensor? h0, Tensor? c0, bool reverse, str[] activations)"
    " -> Tensor"
)
_LIBRARY.define(
    "gru(Tensor gates, Tensor weight, Tensor? bias, Tensor? h0, bool reverse, bool reset_after,"
    " str[] activations) -> Tensor"
)
_LIBRARY.define(
    "rnn(Tensor gates, Tensor weight, Tensor? h0, bool reverse, str[] activations) -> Tensor"
)

lstm: Any = torch.ops.graphopt.lstm.default
gru: Any = torch.ops.graphopt.gru.default
rnn: Any = torch.ops.graphopt.rnn.default

_Step = Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]]
"""Gates [N, G, H], weight [G·H, H] and states, the first one h, give the states after the step."""


def _run(
    gates: Tensor, weight: Tensor, start: Sequence[Tensor | None], reverse: bool,
    step: Callable[[int], _Step],
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(the first state after each step [T, N, D·H], each state in the end [N, D·H])."""
    steps, batch, _ = gates.shape
    directions, columns, hidden = weight.shape
    apart = gates.reshape(steps, batch, directions, columns // hidden, hidden)
    results, ends = [], []
    for d in range(directions):
        backward = reverse or d == 1
        zeros = gates.new_zeros(batch, hidden)
        states = [zeros if state is None else state[d] for state in start]
        seen: list[Tensor] = []
        for t in range(steps)[:: -1 if backward else 1]:
            states = step(d)(apart[t, :, d], weight[d], states)
            seen.append(states[0])
        results.append(torch.stack(seen[:: -1 if backward else 1]))
        ends.append(states)
    together = [torch.cat(states, -1) for states in zip(*ends, strict=True)]
    return torch.cat(results, -1), together


def _functions(names: Sequence[str]) -> list[Callable[[Tensor], Tensor]]:
    return [ACTIVATIONS[name][0] for name in names]


def _lstm(
    gates: Tensor, weight: Tensor, h0: Tensor | None, c0: Tensor | None, reverse: bool,
    activations: Sequence[str],
) -> Tensor:  # fmt: skip
    to_gate, to_cell, to_state = _functions(activations)

    def step(x: Tensor, weight: Tensor, states: list[Tensor]) -> list[Tensor]:
        h, c = states
        i, f, g, o = (x + (h @ weight.T).reshape(x.shape)).unbind(1)
        c = to_gate(f) * c + to_gate(i) * to_cell(g)
        return [to_gate(o) * to_state(c), c]

    y, (_, c) = _run(gates, weight, (h0, c0), reverse, lambda d: step)
    return torch.cat([y, c[None]])


def _gru(
    gates: Tensor, weight: Tensor, bias: Tensor | None, h0: Tensor | None, reverse: bool,
    reset_after: bool, activations: Sequence[str],
) -> Tensor:  # fmt: skip
    to_gate, to_new = _functions(activations)

    def step_of(d: int) -> _Step:
        def step(x: Tensor, weight: Tensor, states: list[Tensor]) -> list[Tensor]:
            (h,) = states
            hidden = h.shape[-1]
            sums = (h @ weight[: 2 * hidden].T).reshape(len(h), 2, hidden)
            r, z = to_gate(x[:, :2] + sums).unbind(1)
            last = weight[2 * hidden :].T
            own_bias = 0 if bias is None else bias[d]
            own = r * (h @ last + own_bias) if reset_after else (r * h) @ last
            return [(1 - z) * to_new(x[:, 2] + own) + z * h]

        return step

    return _run(gates, weight, (h0,), reverse, step_of)[0]


def _rnn(
    gates: Tensor, weight: Tensor, h0: Tensor | None, reverse: bool, activations: Sequence[str]
) -> Tensor:
    (function,) = _functions(activations)

    def step(x: Tensor, weight: Tensor, states: list[Tensor]) -> list[Tensor]:
        return [function(x[:, 0] + states[0] @ weight.T)]

    return _run(gates, weight, (h0,), reverse, lambda d: step)[0]


def _shape(name: str) -> Callable[..., Tensor]:
    """The rule for result shapes, which checks the arguments' shapes, too."""

    def rule(gates: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        steps, batch, columns = gates.shape
        directions, rows, hidden = weight.shape
        if rows != GATES[name] * hidden:
            raise ValueError(f"the recurrent weight is {tuple(weight.shape)}")
        if columns != directions * rows:
            raise ValueError(f"gates have {columns} columns, not {directions * rows}")
        wanted = (directions, batch, hidden)
        states = {"lstm": rest[:2], "gru": rest[1:2], "rnn": rest[:1]}[name]
        for state in states:
            if state is not None and tuple(state.shape) != wanted:
                raise ValueError(f"a state is {tuple(state.shape)}, not {wanted}")
        if name == "gru":
            bias, _, _, reset_after, _ = rest
            if bias is not None and not (reset_after and tuple(bias.shape) == wanted[::2]):
                raise ValueError("only with reset_after there is a bias [D, H]")
        return gates.new_empty(steps + (name == "lstm"), batch, directions * hidden)

    return rule


for _name, _function in (("lstm", _lstm), ("gru", _gru), ("rnn", _rnn)):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _shape(_name), lib=_LIBRARY)


def _check(call: Call) -> str | None:
    if call.dtype != torch.float32:
        return f"{call.dtype} is not supported, only float32"
    for name in ("weight", "bias"):
        value = call.arguments.get(name)
        if value is not None and value.op != "get_attr":
            return f"its recurrent {name} is computed at run time, not a constant"
    return None


def _sample(
    name: str, steps: int, batch: int, directions: int, hidden: int, *rest: Any,
    states: bool = True,
) -> Sample:  # fmt: skip
    """Weights of a size at which states neither die out nor run into their bounds."""
    gates = GATES[name]

    def make(g: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(steps, batch, directions * gates * hidden, generator=g)
        weight = torch.randn(directions, gates * hidden, hidden, generator=g) / hidden**0.5
        start = [
            torch.randn(directions, batch, hidden, generator=g) if states else None
            for _ in range(1 + (name == "lstm"))
        ]
        after = name == "gru" and rest[1]
        own = torch.randn(directions, hidden, generator=g) if after else None
        bias = [own] if name == "gru" else []
        return (x, weight, *bias, *start, *rest)

    # Rounding errors of a step go through the functions of all later ones.
    return Sample(make, ulp=8, constants=(1, 2) if name == "gru" else (1,))


_LSTM = ["sigmoid", "tanh", "tanh"]

RECURRENT: tuple[OpDef, ...] = (
    OpDef("lstm", (lstm,), Kind.ANCHOR, operands=("gates", "weight", "h0", "c0"), check=_check,
          samples=(
              _sample("lstm", 5, 1, 1, 16, False, _LSTM), _sample("lstm", 3, 2, 2, 5, False, _LSTM),
              _sample("lstm", 4, 7, 1, 9, True, _LSTM, states=False),
              _sample("lstm", 1, 1, 2, 1, False, ["sigmoid", "relu", "sigmoid"]),
          )),
    OpDef("gru", (gru,), Kind.ANCHOR, operands=("gates", "weight", "bias", "h0"), check=_check,
          samples=(
              _sample("gru", 5, 1, 1, 16, False, True, ["sigmoid", "tanh"]),
              _sample("gru", 5, 2, 2, 9, False, True, ["sigmoid", "tanh"], states=False),
              _sample("gru", 4, 7, 2, 5, False, False, ["sigmoid", "tanh"]),
              _sample("gru", 4, 1, 1, 8, True, False, ["sigmoid", "relu"]),
          )),
    OpDef("rnn", (rnn,), Kind.ANCHOR, operands=("gates", "weight", "h0"), check=_check,
          samples=(
              _sample("rnn", 5, 1, 2, 16, False, ["tanh"]),
              _sample("rnn", 5, 3, 1, 9, True, ["relu"], states=False),
          )),
)  # fmt: skip
