"""The ONNX files that benchmarks compare on: those of the zoo, and MobileNetV2 exported once."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from bench.contest import OUT, Arrays
from tests.models import zoo

EXPORTED = ("mobilenet_v2",)
"""Models of the zoo that come as PyTorch modules."""

NAMES = (*EXPORTED, *(name for name, entry in zoo.MODELS.items() if entry.kind == "onnx"))


def onnx_file(name: str) -> Path:
    """The model as an ONNX file."""
    entry = zoo.MODELS[name]
    return export(entry) if entry.kind == "torch" else Path(entry.model())


def compile_inputs(name: str) -> Arrays | None:
    """Example inputs, where the file leaves dimensions open."""
    entry = zoo.MODELS[name]
    return entry.inputs() if entry.dynamic else None


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
        warnings.simplefilter("ignore", DeprecationWarning)
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
