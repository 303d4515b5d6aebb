"""ONNX recurrent layers: one product of all inputs, then what goes from step to step.

See `graphopt.ops.recurrent` for the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from graphopt.importers.onnx.shape import permute_to, reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, dtype, shape
from graphopt.ops import recurrent

aten = torch.ops.aten

_DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}
# The place among ONNX's gates (iofc, zrh) of each of ours.
_ORDER = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
_DEFAULTS = {
    "LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"],
}  # fmt: skip

_HARD_SIGMOID = {"activation_alpha": 0.2, "activation_beta": 0.5}
"""The one that there is."""


@dataclass(frozen=True)
class _Layer:
    """What the operators have in common.

    Attributes:
        x: the input [T, N, I].
        activations: as `graphopt.ops.recurrent` names them.
    """

    ctx: Context
    node: OnnxNode
    x: Value
    directions: int
    hidden: int
    reverse: bool
    activations: list[str]

    @property
    def order(self) -> tuple[int, ...]:
        """See `_ORDER`."""
        return _ORDER[self.node.op]

    def in_order(self, value: Value, first: int = 0) -> Value:
        """[D, G·H, …] or a part of [D, 2·G·H] that begins at gate `first`, gates in our order."""
        gates = shape(value)[1] // self.hidden
        apart = reshape_to(self.ctx, value, [self.directions, gates, self.hidden, -1])
        places = torch.tensor([first + gate for gate in self.order])
        taken = self.ctx.op(aten.index_select.default, apart, 1, places)
        sizes = [self.directions, len(self.order) * self.hidden, *shape(value)[2:]]
        return self.ctx.op(aten.reshape.default, taken, sizes)

    def gates(self, bias: Value | None) -> Value:
        """The part of the gates that the inputs give, [T, N, D·G·H]."""
        weight = self.in_order(self.node.value(1))
        columns = self.directions * len(self.order) * self.hidden
        weight = reshape_to(self.ctx, weight, [columns, shape(weight)[-1]])
        biases = [] if bias is None else [reshape_to(self.ctx, bias, [columns])]
        return self.ctx.op(aten.linear.default, self.x, weight, *biases)

    def biases(self) -> tuple[Value, Value] | None:
        """Of the inputs' part and of the state's, [D, G·H] each; None if there are none."""
        bias = self.node.optional(3)
        if bias is None:
            return None
        return self.in_order(bias), self.in_order(bias, len(self.order))

    def summed_bias(self) -> Value | None:
        """Both biases in one, [D, G·H]; None if there are none."""
        biases = self.biases()
        return None if biases is None else self.ctx.op(aten.add.Tensor, *biases)

    def state(self, position: int) -> Value | None:
        """An initial state [D, N, H]; None if it is zero."""
        value = self.node.optional(position)
        if value is None or (isinstance(value, torch.Tensor) and not value.any()):
            return None
        return permute_to(self.ctx, value, (1, 0, 2)) if self.batch_first else value

    @property
    def batch_first(self) -> bool:
        """Whether the batch is the first axis of inputs and outputs."""
        return self.node.get_int("layout", 0) == 1

    def outputs(self, states: Value) -> tuple[Value, Value]:
        """Y and Y_h from the states after each step [T, N, D·H]."""
        steps, batch, _ = shape(states)
        apart = reshape_to(self.ctx, states, [steps, batch, self.directions, self.hidden])
        order = (1, 0, 2, 3) if self.batch_first else (0, 2, 1, 3)
        y = permute_to(self.ctx, apart, order)
        if not self.node.used[1:2] or not self.node.used[1]:
            return y, y
        last = [
            self.ctx.op(aten.select.int, self.ctx.op(aten.select.int, apart, 2, d), 0, place)
            for d, place in enumerate(self.last_places(steps))
        ]
        return y, self.ctx.op(aten.stack.default, last, self.batch_first)

    def last_places(self, steps: int) -> list[int]:
        """The place of each direction's last step in the input."""
        return [0] if self.reverse else [steps - 1, 0][: self.directions]


def _layer(ctx: Context, node: OnnxNode) -> _Layer:
    """Read what the operators have in common.

    Raises:
        Refused: naming all that is not supported.
    """
    direction = node.get_str("direction", "forward")
    directions = _DIRECTIONS.get(direction, 0)
    activations, strange = _activations(node, directions)
    if not directions:
        strange.append(f"direction {direction!r}")
    x = node.value(0)
    if dtype(x) != torch.float32:
        strange.append(f"inputs of {dtype(x)}")
    steps = shape(x)[node.get_int("layout", 0)]
    lengths = node.optional(4)
    if lengths is not None and not (
        isinstance(lengths, torch.Tensor) and bool((lengths == steps).all())
    ):
        strange.append("sequences shorter than the input (sequence_lens)")
    if node.has(7):
        strange.append("peepholes (P)")
    if node.attributes.get("clip"):
        strange.append(f"clip = {node.get_float('clip', 0.0):g}")
    if node.get_int("input_forget", 0):
        strange.append("input_forget = 1")
    if strange:
        raise Refused(f"not supported: {', '.join(strange)}")
    if node.get_int("layout", 0):
        x = permute_to(ctx, x, (1, 0, 2))
    hidden = shape(node.value(2))[-1]
    return _Layer(ctx, node, x, directions, hidden, direction == "reverse", activations)


def _activations(node: OnnxNode, directions: int) -> tuple[list[str], list[str]]:
    """(our names of one direction's functions, what is not supported about them)."""
    default = _DEFAULTS[node.op]
    names = [str(name) for name in node.attributes.get("activations", default * directions)]
    own = names[: len(default)]
    strange = [
        f"activation {name}"
        for name in dict.fromkeys(names)
        if name.lower() not in recurrent.ACTIVATIONS
    ]
    if own * directions != names and not strange:
        strange.append(f"activations {names}")
    if "HardSigmoid" in names:
        for name, value in _HARD_SIGMOID.items():
            given = [float(number) for number in node.attributes.get(name, ())]
            if any(abs(number - value) > 1e-6 for number in given):
                strange.append(f"{name} = {given}")
    return [name.lower() for name in own], strange


def lstm(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """Y, Y_h and Y_c."""
    layer = _layer(ctx, node)
    bias = layer.summed_bias()
    result = ctx.op(
        recurrent.lstm, layer.gates(bias), layer.in_order(node.value(2)), layer.state(5),
        layer.state(6), layer.reverse, layer.activations,
    )  # fmt: skip
    steps, batch = shape(result)[0] - 1, shape(result)[1]
    y, y_h = layer.outputs(ctx.op(aten.slice.Tensor, result, 0, 0, steps))
    if not any(node.used[2:]):
        return y, y_h, y_h
    cell = ctx.op(aten.select.int, result, 0, steps)
    cell = reshape_to(ctx, cell, [batch, layer.directions, layer.hidden])
    return y, y_h, cell if layer.batch_first else permute_to(ctx, cell, (1, 0, 2))


def gru(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """Y and Y_h."""
    layer = _layer(ctx, node)
    after = bool(node.get_int("linear_before_reset", 0))
    bias, own = _biases_apart(layer) if after else (layer.summed_bias(), None)
    result = ctx.op(
        recurrent.gru, layer.gates(bias), layer.in_order(node.value(2)), own, layer.state(5),
        layer.reverse, after, layer.activations,
    )  # fmt: skip
    return layer.outputs(result)


def _biases_apart(layer: _Layer) -> tuple[Value | None, Value | None]:
    """The gates' biases, and that of the state's part of the new gate, which the reset gate is
    multiplied with."""
    biases = layer.biases()
    if biases is None:
        return None, None
    ctx, hidden = layer.ctx, layer.hidden
    of_inputs, of_state = biases
    own = ctx.op(aten.slice.Tensor, of_state, 1, 2 * hidden, 3 * hidden)
    rest = ctx.op(aten.slice.Tensor, of_state, 1, 0, 2 * hidden)
    rest = ctx.op(aten.constant_pad_nd.default, rest, [0, hidden], 0.0)
    return ctx.op(aten.add.Tensor, of_inputs, rest), own


def rnn(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """Y and Y_h."""
    layer = _layer(ctx, node)
    bias = layer.summed_bias()
    result = ctx.op(
        recurrent.rnn, layer.gates(bias), layer.in_order(node.value(2)), layer.state(5),
        layer.reverse, layer.activations,
    )  # fmt: skip
    return layer.outputs(result)


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value | tuple[Value, ...]]] = {
    "GRU": gru,
    "LSTM": lstm,
    "RNN": rnn,
}
