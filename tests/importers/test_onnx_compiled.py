"""Libraries of ONNX models whose operators are written out as several, beside ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

import graphopt
from tests.importers.onnx_cases import floats, ints, one_node, run_reference

Arrays = dict[str, np.ndarray]

REGIONS = np.array([[0, 0, 7, 5], [1.3, 2.1, 9.7, 8.2], [-4, -3, 3, 30]], np.float32)
PLACES = np.array([[[0, 1], [2, -1]], [[0, 1], [-3, 0]]], np.int64)
# Operator, inputs, constants, attributes.
CASES: list[tuple[str, Arrays, Arrays, dict[str, object]]] = [
    (
        "RoiAlign",
        {"x": floats(2, 5, 8, 10), "r": REGIONS, "i": ints(0, 1, 1)},
        {},
        {"output_height": 3, "output_width": 2, "sampling_ratio": 2, "spatial_scale": 0.5},
    ),
    (
        "OneHot",
        {"i": ints(3, -1, 7, 0)},
        {"d": np.array(4, np.int64), "v": np.array([0, 2.5], np.float32)},
        {},
    ),
    ("ReverseSequence", {"x": floats(5, 3, 7), "n": ints(1, 5, 3)}, {}, {}),
    ("CumSum", {"x": floats(3, 5)}, {"a": np.array(1, np.int64)}, {"exclusive": 1, "reverse": 1}),
    ("MaxPool", {"x": floats(2, 3, 9)}, {}, {"kernel_shape": [3], "strides": [2], "pads": [1, 1]}),
    ("BitShift", {"x": np.arange(9, dtype=np.uint8)}, {"n": np.array([3], np.uint8)},
     {"direction": "LEFT"}),
    *(
        ("ScatterND", {"x": floats(3, 4, 9), "i": PLACES, "u": floats(2, 2, 9, seed=1)}, {},
         {"reduction": reduction})
        for reduction in ("add", "mul", "max", "min")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("op", "inputs", "constants", "attributes"), CASES)
def test_as_onnx_runtime(
    op: str, inputs: Arrays, constants: Arrays, attributes: dict[str, object]
) -> None:
    outputs = 2 if op == "MaxPool" else 1
    model = one_node(op, inputs, constants, outputs=outputs, **attributes)
    results = graphopt.compile(model, inputs)(*inputs.values())
    results = results if isinstance(results, tuple) else (results,)
    for have, want in zip(results, run_reference(model, inputs), strict=True):
        assert have.dtype == want.dtype
        # Means of 16 products at most.
        np.testing.assert_allclose(have, want, rtol=1e-6, atol=2e-6)
