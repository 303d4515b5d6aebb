"""ONNX's LSTM, GRU and RNN against ONNX Runtime, and against PyTorch what that does not run."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.importers import import_model
from tests.importers.onnx_cases import assert_same, floats, graph_model, run_import

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
OPERATORS = list(GATES)
TOLERANCE = 1e-6
"""Relative to the largest output: a few roundings, which go through three steps."""
STEPS, BATCH, INPUTS, HIDDEN = 3, 2, 5, 4


def model(
    op: str, *, direction: str = "forward", given: str = "B", used: str = "Y Y_h Y_c",
    runtime: bool = False, lengths: list[int] | None = None, layout: int = 0, **attributes: Any,
) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:  # fmt: skip
    """A layer and its inputs.

    Args:
        op: the operator.
        direction: as the attribute.
        given: the optional inputs that there are.
        used: the outputs that there are.
        runtime: whether initial states are inputs of the model, not constants.
        lengths: the value of `sequence_lens`.
        layout: as the attribute.
        attributes: others.
    """
    d, g = 1 + (direction == "bidirectional"), GATES[op]
    state = (BATCH, d, HIDDEN) if layout else (d, BATCH, HIDDEN)
    known = {
        "W": floats(d, g * HIDDEN, INPUTS, seed=1) / 2,
        "R": floats(d, g * HIDDEN, HIDDEN, seed=2) / 2,
        "B": floats(d, 2 * g * HIDDEN, seed=3), "initial_h": floats(*state, seed=4),
        "initial_c": floats(*state, seed=5), "P": floats(d, 3 * HIDDEN, seed=6),
        "sequence_lens": np.array(lengths or [], np.int32),
    }  # fmt: skip
    x = {"X": floats(BATCH, STEPS, INPUTS) if layout else floats(STEPS, BATCH, INPUTS)}
    there = ["X", "W", "R", *given.split()]
    order = ["X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"]
    if lengths is not None:
        there.append("sequence_lens")
    names = [name if name in there else "" for name in order]
    while not names[-1]:
        names.pop()
    inputs = x | {n: known[n] for n in there if runtime and n.startswith("initial")}
    constants = {n: known[n] for n in there if n not in inputs}
    outputs = [n if n in used.split() else "" for n in ("Y", "Y_h", "Y_c")[: 2 + (op == "LSTM")]]
    if layout:
        attributes["layout"] = layout
    node = helper.make_node(op, names, outputs, "layer", direction=direction, hidden_size=HIDDEN,
                            **attributes)  # fmt: skip
    return graph_model([node], inputs, constants, [n for n in outputs if n], 17), inputs


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_inputs_and_outputs(op: str, direction: str) -> None:
    for given, used in itertools.product(
        ("", "B", "initial_h", "B initial_h initial_c"), ("Y Y_h Y_c", "Y", "Y_h")
    ):
        for runtime in (False, True) if "initial" in given else (False,):
            if op != "LSTM":
                given = given.replace(" initial_c", "")
            case = model(op, direction=direction, given=given, used=used, runtime=runtime)
            assert_same(*case, TOLERANCE)


@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("before", [0, 1])
def test_reset_gate(direction: str, before: int) -> None:
    for given in ("", "B", "B initial_h"):
        case = model("GRU", direction=direction, given=given, linear_before_reset=before)
        assert_same(*case, TOLERANCE)


ACTIVATIONS = [
    ("LSTM", ["Sigmoid", "Tanh", "Tanh"]), ("LSTM", ["Sigmoid", "Relu", "Sigmoid"]),
    ("GRU", ["Sigmoid", "Relu"]), ("GRU", ["Tanh", "Sigmoid"]), ("RNN", ["Relu"]),
    ("RNN", ["Sigmoid"]), ("RNN", ["Softsign"]), ("LSTM", ["HardSigmoid", "Tanh", "Softsign"]),
]  # fmt: skip


@pytest.mark.parametrize(("op", "functions"), ACTIVATIONS)
def test_activations(op: str, functions: list[str]) -> None:
    assert_same(*model(op, activations=functions), TOLERANCE)
    both = model(op, direction="bidirectional", activations=functions * 2)
    assert_same(*both, TOLERANCE)


@pytest.mark.parametrize("op", OPERATORS)
def test_sequences_as_long_as_the_input(op: str) -> None:
    assert_same(*model(op, lengths=[STEPS, STEPS]), TOLERANCE)


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_batch_first(op: str, direction: str) -> None:
    """`layout` = 1, which ONNX Runtime does not run, is `layout` = 0 with axes moved."""
    given = "B initial_h initial_c" if op == "LSTM" else "B initial_h"
    first, inputs = model(op, direction=direction, given=given, runtime=True, layout=1)
    second, _ = model(op, direction=direction, given=given, runtime=True)
    moved = {name: value.swapaxes(0, 1).copy() for name, value in inputs.items()}
    y, *states = run_import(first, inputs)
    wanted, *wanted_states = run_import(second, moved)
    pairs = [(y, wanted.transpose(2, 0, 1, 3)),
             *((state, other.swapaxes(0, 1)) for other, state in zip(wanted_states, states,
                                                                     strict=True))]  # fmt: skip
    for have, want in pairs:
        np.testing.assert_allclose(have, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_exported_by_pytorch(kind: type[nn.RNNBase], tmp_path: Any) -> None:
    torch.manual_seed(0)
    layer = kind(INPUTS, HIDDEN, 2, bidirectional=True, batch_first=True).eval()
    x, path = torch.from_numpy(floats(BATCH, STEPS, INPUTS)), tmp_path / "layer.onnx"
    torch.onnx.export(layer, (x,), path, dynamo=False, opset_version=17)
    with torch.no_grad():
        y, states = layer(x)
    states = states if isinstance(states, tuple) else (states,)
    for have, want in zip(import_model(path)(x), (y, *states), strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=TOLERANCE)


def refusal(op: str, **kwargs: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        import_model(*model(op, **kwargs))
    return str(caught.value)


def test_what_is_not_supported_is_named() -> None:
    text = refusal("LSTM", given="P", lengths=[3, 2], clip=1.5, input_forget=1,
                   activations=["Elu", "Tanh", "Affine"])  # fmt: skip
    assert "ONNX node 'layer' (LSTM): not supported: " in text
    reasons = [
        *("activation Elu", "activation Affine", "peepholes (P)", "clip = 1.5"),
        *("sequences shorter than the input (sequence_lens)", "input_forget = 1"),
    ]
    assert all(reason in text for reason in reasons), text
    text = refusal("RNN", direction="bidirectional", activations=["Tanh", "Relu"])
    assert "activations ['Tanh', 'Relu']" in text
    text = refusal("GRU", activations=["HardSigmoid", "Tanh"], activation_alpha=[0.3])
    assert "activation_alpha = [0.3" in text
    text = refusal("GRU", direction="sideways")
    assert "direction 'sideways'" in text
