"""The onnx package's "light" classics with seeded random weights, so that comparing says something.

As shipped every weight is one constant (0.02), so every class gets the same probability whatever
the input is: a compiler could drop the whole network and still agree. `light_model` writes a copy
whose weights are random at a scale that keeps activations and logits ordinary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from tests.models.wheels import cache_folder, write_whole

RECIPE = 1  # part of the file name: raise it when the random weights are drawn another way


def light_model(name: str, *, randomize: bool = True, seed: int = 0) -> Path:
    """The path of `light_<name>.onnx`: as shipped, or a copy in the cache with random weights."""
    shipped = Path(onnx.__file__).parent / "backend/test/data/light" / f"light_{name}.onnx"
    if not randomize:
        return shipped
    path = cache_folder() / "light" / f"light_{name}-seed{seed}-recipe{RECIPE}.onnx"
    if not path.exists():
        model = onnx.load(shipped)
        randomize_weights(model, np.random.default_rng(seed))
        write_whole(path, model.SerializeToString())
    return path


def randomize_weights(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    """Replace every float weight, in place, also those that a ConstantOfShape makes."""
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    shapes: dict[str, tuple[int, ...]] = {
        name: tuple(tensor.dims)
        for name, tensor in stored.items()
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    kept = []
    shape_names = set()
    for node in graph.node:
        if node.op_type == "ConstantOfShape" and node.input[0] in stored:
            sizes = numpy_helper.to_array(stored[node.input[0]])
            shapes[node.output[0]] = tuple(int(size) for size in sizes)
            shape_names.add(node.input[0])
        else:
            kept.append(node)
    weights: dict[str, np.ndarray] = {}
    for node in kept:
        for position, name in enumerate(node.input):
            if name in shapes and name not in weights:
                weights[name] = draw(node.op_type, position, shapes[name], rng)

    dropped = shape_names | set(shapes)
    inputs = [value for value in graph.input if value.name not in dropped]
    others = [tensor for name, tensor in stored.items() if name not in dropped]
    for field in (graph.node, graph.input, graph.initializer):
        del field[:]
    graph.node.extend(kept)
    graph.input.extend(inputs)
    graph.initializer.extend(others)
    graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in weights.items()
    )
    model.ir_version = max(model.ir_version, 4)  # from 4 on initializers need not be inputs


def draw(op: str, position: int, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """A weight for input `position` of `op`, keeping the variance of what flows through it."""
    if op == "BatchNormalization":
        # scale, bias, mean, variance; a scale under 1 keeps sums of residuals from growing
        low, high = {1: (0.3, 0.8), 2: (-0.3, 0.3), 3: (-0.3, 0.3), 4: (0.5, 1.5)}[position]
        values = rng.uniform(low, high, shape)
    elif len(shape) == 1:
        values = rng.uniform(-0.1, 0.1, shape)
    else:
        gain = 2.0 if op == "Conv" else 1.0
        values = rng.standard_normal(shape) * np.sqrt(gain / np.prod(shape[1:]))
    return values.astype(np.float32)
