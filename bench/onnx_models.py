"""The ONNX files that benchmarks compare on: exported architectures, those of the zoo, any file.

The exported ones are well-known architectures with random weights (`peers/export.py`). Most of
the zoo's are trained; those of them that are PyTorch modules are exported here, once.
"""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from bench.contest import OUT, Arrays
from bench.peers import environment
from bench.peers.export import EXPORTS, TOKENS
from graphopt.errors import ModelError
from tests.models import zoo

EXPORTED = tuple(EXPORTS)
"""The default models: `make peers` exports them."""

NAMES = (*EXPORTED, *(name for name in zoo.MODELS if name not in EXPORTED))


@dataclass(frozen=True)
class BenchModel:
    """One ONNX file and what it is fed with.

    Args:
        name: for tables and for the library, so a C identifier.
        inputs: by name, in the model's order.
        dynamic: the file leaves dimensions open, so that compiling it takes the inputs.
        exported: it is one of `peers/export.py`, which can also build its PyTorch module.
    """

    name: str
    path: Path
    inputs: Arrays
    dynamic: bool = False
    exported: bool = False

    def compile_inputs(self) -> Arrays | None:
        """The example inputs that `graphopt.compile` needs."""
        return self.inputs if self.dynamic else None


def find(name: str) -> BenchModel:
    """A model by its name, or by the path of an ONNX file with fixed shapes.

    Raises:
        PeersMissingError: it is an exported one, and `make peers` has not been run.
        ModelError: no such model, or a file that cannot be used.
    """
    if name in EXPORTS:
        return BenchModel(name, environment.exported(name), _exported_inputs(name), exported=True)
    if name in zoo.MODELS:
        entry = zoo.MODELS[name]
        path = export(entry) if entry.kind == "torch" else Path(entry.model())
        return BenchModel(name, path, entry.inputs(), entry.dynamic)
    path = Path(name).resolve()
    if path.suffix != ".onnx" or not path.is_file():
        raise ModelError(f"no such model: {name}", hint=f"an .onnx file, or {', '.join(NAMES)}.")
    return BenchModel(re.sub(r"\W", "_", path.stem), path, _drawn_inputs(path))


def export(entry: Any) -> Path:
    """A PyTorch model of the zoo as ONNX, kept in `bench-out/`."""
    path = OUT / f"{entry.name}.onnx"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    inputs = entry.inputs()
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings():
        # The new exporter needs onnxscript; for these models the old one gives the same graph.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            entry.model(),
            tuple(torch.from_numpy(array) for array in inputs.values()),
            str(partial),
            dynamo=False,
            input_names=list(inputs),
            output_names=["output"],
        )
    os.replace(partial, path)
    return path


def _exported_inputs(name: str) -> Arrays:
    rng = np.random.default_rng(0)
    if EXPORTS[name].image:
        return {"image": rng.standard_normal((1, 3, 224, 224)).astype(np.float32)}
    return {
        "input_ids": rng.integers(1000, 30000, (1, TOKENS)),
        "attention_mask": np.ones((1, TOKENS), np.int64),
    }


def _drawn_inputs(path: Path) -> Arrays:
    """Normal floats; ones for all other dtypes, since nobody knows what they count."""
    rng = np.random.default_rng(0)
    inputs = {}
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    for value in graph.input:
        if value.name in constants:
            continue
        kind = value.type.tensor_type
        shape = [size.dim_value for size in kind.shape.dim]
        if not all(shape):
            raise ModelError(
                f"{path} leaves dimensions of its input {value.name} open",
                hint="export it with fixed shapes.",
            )
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        draw = rng.standard_normal(shape) if dtype.kind == "f" else np.ones(shape)
        inputs[value.name] = draw.astype(dtype)
    return inputs
