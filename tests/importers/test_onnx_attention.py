"""ONNX's Attention and RotaryEmbedding as libraries, beside the standard's own implementation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

import graphopt
from graphopt import graph as G
from graphopt.errors import UnsupportedError
from graphopt.importers import import_model
from tests.importers.onnx_cases import floats, ints, one_node

Arrays = dict[str, np.ndarray]

Q, K, V = floats(2, 4, 5, 8), floats(2, 4, 9, 8, seed=1), floats(2, 4, 9, 7, seed=2)
SELF = {"Q": Q, "K": floats(2, 4, 5, 8, seed=1), "V": floats(2, 4, 5, 7, seed=2)}
CROSS = {"Q": Q, "K": K, "V": V}
GROUPED = {"Q": Q, "K": K[:, :2], "V": V[:, :2]}
ROWS = {"Q": floats(2, 5, 24), "K": floats(2, 9, 12, seed=1), "V": floats(2, 9, 10, seed=2)}
HEADS = {"q_num_heads": 4, "kv_num_heads": 2}
PAST = {"past_key": floats(2, 2, 3, 6, seed=3), "past_value": floats(2, 2, 3, 5, seed=4)}
CHOICE = np.random.default_rng(5).random((2, 1, 5, 9)) < 0.6
CHOICE[0, 0, 2] = False
LENGTHS = {"nonpad_kv_seqlen": ints(3, 8)}
NAMES = ("Q", "K", "V", "attn_mask", "past_key", "past_value", "nonpad_kv_seqlen")

# Inputs, results, opset, attributes.
ATTENTION: dict[str, tuple[Arrays, int, int, dict[str, object]]] = {
    "plain": (CROSS, 1, 23, {"scale": 0.3}),
    "causal": (SELF, 1, 23, {"is_causal": 1}),
    "causal, more keys": (CROSS, 1, 23, {"is_causal": 1}),
    "groups of heads": (GROUPED, 1, 23, {}),
    "heads in columns, past": (ROWS | PAST, 3, 23, {"is_causal": 1, **HEADS}),
    "boolean mask, a row of nothing": (CROSS | {"attn_mask": CHOICE}, 1, 23, {}),
    "boolean mask, causal": (CROSS | {"attn_mask": CHOICE}, 1, 23, {"is_causal": 1}),
    "added mask": (CROSS | {"attn_mask": floats(4, 5, 9, seed=6)}, 1, 23, {"is_causal": 1}),
    "short mask": (CROSS | {"attn_mask": floats(5, 6, seed=6)}, 1, 24, {}),
    "short boolean mask": (CROSS | {"attn_mask": CHOICE[..., 3:7]}, 1, 24, {}),
    "lengths": (CROSS | LENGTHS, 1, 24, {}),
    "lengths, causal": (CROSS | LENGTHS, 1, 24, {"is_causal": 1}),
    "window": (CROSS, 1, 25, {"left_window_size": 2, "right_window_size": 1}),
    "window, past": (ROWS | PAST, 1, 25, {"left_window_size": 3, "is_causal": 1, **HEADS}),
    "window, lengths": (GROUPED | LENGTHS, 1, 25, {"left_window_size": 1}),
    "capped": (GROUPED | {"attn_mask": CHOICE}, 1, 23, {"softcap": 0.7}),
    "capped, causal": (SELF, 1, 23, {"softcap": 0.7, "is_causal": 1}),
    **{
        f"scores {mode}": (
            GROUPED | {"attn_mask": CHOICE}, 4, 23,
            # The reference caps the products that mode 0 shows; the text says that they are raw.
            {"softcap": 0.7 if mode else 0.0, "qk_matmul_output_mode": mode},
        )
        for mode in range(4)
    },
}  # fmt: skip


def compare(model: object, inputs: Arrays) -> None:
    wanted = ReferenceEvaluator(model).run(None, inputs)
    results = graphopt.compile(model, tuple(inputs.values()))(*inputs.values())
    results = results if isinstance(results, tuple) else (results,)
    for have, want in zip(results, wanted, strict=True):
        np.testing.assert_allclose(have, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str) -> None:
    inputs, outputs, opset, attributes = ATTENTION[case]
    last = max(NAMES.index(name) for name in inputs)
    order = [name if name in inputs else "" for name in NAMES[: last + 1]]
    inputs = {name: inputs[name] for name in order if name}
    compare(one_node("Attention", inputs, opset=opset, order=order, outputs=outputs, **attributes),
            inputs)  # fmt: skip


def test_attention_is_one_operator() -> None:
    """Where nothing but the causal triangle restricts the keys, that is no mask but an option."""
    inputs = {"Q": SELF["Q"], "K": SELF["K"], "V": SELF["V"]}
    model = one_node("Attention", inputs, opset=23, is_causal=1)
    gm = import_model(model, tuple(inputs.values()))
    (node,) = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert node.target is torch.ops.aten.scaled_dot_product_attention.default
    assert node.args[3:] == (None, 0.0, True)
    assert G.shape(node) == (2, 4, 5, 7)


@pytest.mark.parametrize("pairs", [{}, {"interleaved": 1}])
@pytest.mark.parametrize("turned", [0, 6])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("places", [False, True])
def test_rotary_embedding(pairs: dict[str, int], turned: int, columns: bool, places: bool) -> None:
    angles = floats(*((50,) if places else (2, 3)), (turned or 10) // 2, seed=1)
    inputs = {"X": floats(2, 3, 40) if columns else floats(2, 4, 3, 10)}
    inputs |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    if places:
        inputs["ids"] = np.array([[0, 7, 49], [3, 3, 1]])
    model = one_node("RotaryEmbedding", inputs, opset=23, rotary_embedding_dim=turned,
                     **({"num_heads": 4} if columns else {}), **pairs)  # fmt: skip
    compare(model, inputs)


@pytest.mark.parametrize(
    ("inputs", "attributes", "complaint"),
    [
        (ROWS, {"q_num_heads": 5, "kv_num_heads": 2}, "q_num_heads = 5 does not divide its 24"),
        (ROWS, {}, "q_num_heads = 0"),
        (GROUPED | {"past_key": K[:, :2]}, {}, "past keys or past values, but not both"),
    ],
)
def test_refused(inputs: Arrays, attributes: dict[str, int], complaint: str) -> None:
    order = ["Q", "K", "V", *(["", "past_key"] if "past_key" in inputs else [])]
    model = one_node("Attention", inputs, opset=23, order=order, **attributes)
    with pytest.raises(UnsupportedError, match=complaint):
        import_model(model, tuple(inputs.values()))


def test_rotary_embedding_with_too_few_angles() -> None:
    angles = floats(2, 3, 3)
    turned = {"X": floats(2, 4, 3, 10), "cos": angles, "sin": angles}
    with pytest.raises(UnsupportedError, match="angles are of 3 pairs of channels, not of 5"):
        import_model(one_node("RotaryEmbedding", turned, opset=23), tuple(turned.values()))
