"""nn.LSTM, nn.GRU and nn.RNN: their graphs, and what they compute once compiled."""

from __future__ import annotations

import itertools
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

TOLERANCE = 1e-6
"""Largest difference: a few roundings of numbers up to 1, which go through four steps."""
COMPILED_TOLERANCE = 2e-6

KINDS = {
    "LSTM": (nn.LSTM, recurrent.lstm), "GRU": (nn.GRU, recurrent.gru),
    "RNN": (nn.RNN, recurrent.rnn),
}  # fmt: skip


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


class Forms(nn.Module):
    """Layers of one kind in all forms, which are traced together: tracing takes a second."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        flags = (False, True)
        self.forms = list(itertools.product((1, 2), *[flags] * 3))
        self.layers = nn.ModuleList(
            make(3, 5, count, bidirectional=both, batch_first=first, bias=bias,
                 dropout=0.3 * (count - 1))
            for count, both, first, bias in self.forms
        )  # fmt: skip

    def forward(self, x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
        """Of a batch and of one sequence, without and with initial states; h and c [4, 4, 5]."""
        results = []
        for layer, (count, both, first, _) in zip(self.layers, self.forms, strict=True):
            states, batch = count * (1 + both), 4 if first else 2
            for given, start in ((x, (slice(states), slice(batch))), (x[0], (slice(states), 0))):
                pair = (h[start], c[start])
                state = pair if isinstance(layer, nn.LSTM) else pair[0]
                results += [layer(given), layer(given, state)]
        return results


@pytest.mark.parametrize("kind", KINDS)
def test_all_forms(kind: str) -> None:
    torch.manual_seed(0)
    make, operator = KINDS[kind]
    args = (random(4, 2, 3), random(4, 4, 5, seed=1), random(4, 4, 5, seed=2))
    assert_imports(Forms(make).eval(), *args, operator=operator, count=16 * 4 * 3 // 2)


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
