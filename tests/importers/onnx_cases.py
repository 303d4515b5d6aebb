"""One-node ONNX models, and the comparison of their import with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from torch import fx

from graphopt.importers import import_model


def value_info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, array.shape)


def graph_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    opset: int,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "test",
        [value_info(name, array) for name, array in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    return model


def one_node(
    op: str,
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 18,
    order: Sequence[str] | None = None,
    outputs: int = 1,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one node that reads `inputs`, then `constants` (or in the given order)."""
    constants = constants or {}
    names = list(order) if order is not None else [*inputs, *constants]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, results, name=f"the_{op}", **attributes)
    return graph_model([node], inputs, constants, results, opset)


def run_import(model: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    gm = import_model(model, dict(inputs))
    check_form(gm)
    with torch.no_grad():
        results = gm(*(torch.from_numpy(array.copy()) for array in inputs.values()))
    return [result.numpy() for result in results]


def run_reference(model: Any, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    source = model.SerializeToString() if isinstance(model, onnx.ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(inputs))


def assert_same(
    model: onnx.ModelProto, inputs: Mapping[str, np.ndarray], tolerance: float = 1e-5
) -> None:
    """The import equals ONNX Runtime: shape, type, and values to tolerance × the largest."""
    expected = run_reference(model, inputs)
    for have, want in zip(run_import(model, inputs), expected, strict=True):
        assert have.shape == want.shape
        assert have.dtype == want.dtype
        if want.dtype.kind == "f":
            scale = max(float(np.abs(want[np.isfinite(want)]).max(initial=0)), 1e-3)
            np.testing.assert_allclose(have, want, rtol=0, atol=tolerance * scale)
        else:
            np.testing.assert_array_equal(have, want)


def check_form(gm: fx.GraphModule) -> None:
    """What `graphopt.graph` promises of every graph."""
    kinds = {node.op for node in gm.graph.nodes}
    assert kinds <= {"placeholder", "get_attr", "call_function", "output"}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            assert isinstance(node.target, torch._ops.OpOverload) or (
                node.target.__name__ == "getitem"
            )
        if node.op != "output":
            assert all(isinstance(place, str) for place in node.meta["origin"])
            value = node.meta["val"]
            for tensor in value if isinstance(value, tuple | list) else (value,):
                assert tensor.device.type == "meta"
        if node.op == "get_attr":
            assert "." not in node.target
            assert isinstance(getattr(gm, node.target), torch.Tensor)
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(placeholders) == len(gm.meta["input_names"])
    assert isinstance(gm.graph.output_node().args[0], tuple)
    assert len(gm.graph.output_node().args[0]) == len(gm.meta["output_names"])


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)
