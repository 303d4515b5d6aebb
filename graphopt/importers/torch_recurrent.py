"""PyTorch's recurrent layers, broken up into one product of all inputs and one operator for what
goes from step to step: see `graphopt.ops.recurrent`.

Each rule has the arguments of the operator that `nn.LSTM`, `nn.GRU` or `nn.RNN` calls. With
dropout in training, or projections (`proj_size`), PyTorch's own rules apply, which write out all
steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from graphopt.ops import recurrent

aten = torch.ops.aten


@dataclass(frozen=True)
class _Weights:
    """Those of a layer, of all directions.

    Attributes:
        of_inputs: [D·G·H, I].
        of_state: [D, G·H, H].
        biases: of the inputs' and of the state's part, [D, G·H] each; None without.
    """

    of_inputs: Tensor
    of_state: Tensor
    biases: tuple[Tensor, Tensor] | None


_Layer = Callable[[Tensor, _Weights, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""Input [T, N, I], weights and initial states [D, N, H] give [T, N, D·H] and the last states that
are not in it, [D, N, H]."""


def _layers(
    x: Tensor, states: Sequence[Tensor], params: Sequence[Tensor], has_biases: bool,
    num_layers: int, bidirectional: bool, batch_first: bool, layer: _Layer,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All layers of a network: its output and its last states [layers·D, N, H]."""
    directions, each = 1 + bidirectional, 2 + 2 * has_biases
    if batch_first:
        x = x.transpose(0, 1)
    ends: list[list[Tensor]] = [[] for _ in states]
    for number in range(num_layers):
        first = number * directions
        own = [params[(first + d) * each : (first + d + 1) * each] for d in range(directions)]
        weights = _Weights(
            torch.cat([some[0] for some in own]),
            torch.stack([some[1] for some in own]),
            (torch.stack([some[2] for some in own]), torch.stack([some[3] for some in own]))
            if has_biases
            else None,
        )
        x, others = layer(x, weights, [state[first : first + directions] for state in states])
        for end, state in zip(ends, [_last(x, directions), *others], strict=True):
            end.append(state)
    y = x.transpose(0, 1) if batch_first else x
    return (y, *(torch.cat(end) for end in ends))


def _last(y: Tensor, directions: int) -> Tensor:
    """The state [D, N, H] after the last step of each direction."""
    hidden = y.shape[2] // directions
    last = [y[-1, :, :hidden], y[0, :, hidden:]]
    return torch.stack(last[:directions])


def _gates(x: Tensor, weights: _Weights, bias: Tensor | None) -> Tensor:
    flat = None if bias is None else bias.reshape(-1)
    return torch.nn.functional.linear(x, weights.of_inputs, flat)


def _lstm_layer(x: Tensor, weights: _Weights, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    bias = None if weights.biases is None else weights.biases[0] + weights.biases[1]
    steps, batch, _ = x.shape
    activations = ["sigmoid", "tanh", "tanh"]
    gates = _gates(x, weights, bias)
    result = recurrent.lstm(gates, weights.of_state, *states, False, activations)
    cell = result[steps].reshape(batch, len(weights.of_state), -1).transpose(0, 1)
    return result[:steps], [cell]


def _gru_layer(x: Tensor, weights: _Weights, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    hidden = weights.of_state.shape[2]
    bias, own = None, None
    if weights.biases is not None:
        of_inputs, of_state = weights.biases
        own = of_state[:, 2 * hidden :]
        bias = of_inputs + torch.constant_pad_nd(of_state[:, : 2 * hidden], [0, hidden])
    gates = _gates(x, weights, bias)
    activations = ["sigmoid", "tanh"]
    return recurrent.gru(gates, weights.of_state, own, *states, False, True, activations), []


def _rnn_layer(activation: str) -> _Layer:
    def layer(x: Tensor, weights: _Weights, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        bias = None if weights.biases is None else weights.biases[0] + weights.biases[1]
        gates = _gates(x, weights, bias)
        return recurrent.rnn(gates, weights.of_state, *states, False, [activation]), []

    return layer


def _rule(operator: Any, layer: _Layer) -> Callable[..., Any]:
    (written_out,) = get_decompositions([operator]).values()

    def rule(
        x: Tensor, hx: Tensor | Sequence[Tensor], params: Sequence[Tensor], has_biases: bool,
        num_layers: int, dropout: float, train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        states = [hx] if isinstance(hx, Tensor) else list(hx)
        projects = len({state.shape[2] for state in states}) > 1
        if projects or (train and dropout):
            return written_out(x, hx, params, has_biases, num_layers, dropout, train,
                               bidirectional, batch_first)  # fmt: skip
        return _layers(x, states, params, has_biases, num_layers, bidirectional, batch_first, layer)

    return rule


RULES: dict[Any, Callable[..., Any]] = {
    operator: _rule(operator, layer)
    for operator, layer in (
        (aten.lstm.input, _lstm_layer),
        (aten.gru.input, _gru_layer),
        (aten.rnn_tanh.input, _rnn_layer("tanh")),
        (aten.rnn_relu.input, _rnn_layer("relu")),
    )
}
