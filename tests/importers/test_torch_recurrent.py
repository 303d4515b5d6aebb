"""nn.LSTM, nn.GRU and nn.RNN: their graphs, and what they compute once compiled."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.importers import import_model
from graphopt.ops import recurrent
from tests.importers.onnx_cases import check_form

TOLERANCE = 2e-6
"""Largest difference: a few roundings of numbers up to 1, which go through four steps."""
COMPILED_TOLERANCE = 4e-6

KINDS = {
    "LSTM": (nn.LSTM, recurrent.lstm), "GRU": (nn.GRU, recurrent.gru),
    "RNN": (nn.RNN, recurrent.rnn),
}  # fmt: skip


# batch_first, bias, whether there is a batch, whether there is an initial state; every pair of
# values is among them. Tracing takes a second.
FORMS = [
    (False, True, True, False), (True, True, True, True), (False, False, True, True),
    (True, False, False, False), (False, True, False, True),
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves(structure: Any) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(structure)


def assert_imports(module: nn.Module, *args: Any, operator: Any = None, count: int = 1) -> None:
    """The import computes all outputs of the module, with the operator so many times."""
    gm = import_model(module, args)
    check_form(gm)
    with torch.no_grad():
        expected = leaves(module(*args))
    for have, want in zip(gm(*leaves(args)), expected, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=TOLERANCE)
    if operator is not None:
        assert [node.target for node in gm.graph.nodes].count(operator) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_all_forms(kind: str, layers: int, bidirectional: bool) -> None:
    torch.manual_seed(0)
    make, operator = KINDS[kind]
    for batch_first, bias, batched, given in FORMS:
        module = make(3, 5, layers, bidirectional=bidirectional, batch_first=batch_first,
                      bias=bias, dropout=0.3 * (layers - 1)).eval()  # fmt: skip
        batch = (4 if batch_first else 2,) if batched else ()
        x = random(*((4, 2, 3) if batched else (4, 3)))
        h, c = (random(layers * (1 + bidirectional), *batch, 5, seed=seed) for seed in (1, 2))
        state = (h, c) if kind == "LSTM" else h
        args = (x, state) if given else (x,)
        assert_imports(module, *args, operator=operator, count=layers)


def test_relu() -> None:
    torch.manual_seed(0)
    module = nn.RNN(3, 5, 2, nonlinearity="relu", bidirectional=True).eval()
    assert_imports(module, random(4, 2, 3), operator=recurrent.rnn, count=2)


def test_projections_are_written_out() -> None:
    torch.manual_seed(0)
    module = nn.LSTM(3, 5, 2, bidirectional=True, proj_size=2).eval()
    assert_imports(module, random(4, 2, 3), operator=recurrent.lstm, count=0)


def test_no_warning_about_lists_of_weights() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_model(nn.GRU(3, 5).eval(), random(4, 2, 3))


class Network(nn.Module):
    """Every kind, with all that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(7, 13, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(26, 10)
        self.rnn = nn.RNN(10, 21, bidirectional=True)
        self.projected = nn.LSTM(42, 9, proj_size=4)

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        y, states = self.lstm(x, (h, c))
        z, last = self.gru(y)
        w, end = self.rnn(torch.relu(z))
        return y, states, z, last, end, self.projected(w)


@pytest.mark.parametrize("target", ["host", "cortex-a72"])
def test_compiled(target: str) -> None:
    torch.manual_seed(0)
    module = Network().eval()
    args = (random(3, 6, 7), random(4, 3, 13, seed=1), random(4, 3, 13, seed=2))
    compiled = graphopt.compile(module, args, target=target)
    with torch.no_grad():
        expected = leaves(module(*args))
    for have, want in zip(compiled(*(arg.numpy() for arg in args)), expected, strict=True):
        np.testing.assert_allclose(have, want.numpy(), rtol=0, atol=COMPILED_TOLERANCE)


def test_weights_that_are_inputs() -> None:
    class Given(nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            params = [weight[:, :3], weight[:, 3:]]
            start = torch.zeros(1, 2, 5)
            y, _ = torch.rnn_tanh(x, start, params, False, 1, 0.0, False, False, False)
            return y

    with pytest.raises(UnsupportedError, match="weight is computed at run time, not a constant"):
        graphopt.compile(Given().eval(), (random(4, 2, 3), random(5, 8)))
