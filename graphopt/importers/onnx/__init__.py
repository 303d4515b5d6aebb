"""ONNX models to graphs, through onnx-graphsurgeon.

Operators are grouped in files by family; each file has a handler per operator, a plain function
from `(Context, OnnxNode)` to a value, and lists them in its `HANDLERS`. To add an operator, write
its handler in the file of its family and add it there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import fx

from graphopt.importers.inputs import ExampleInputs
from graphopt.importers.onnx import (
    activation,
    attention,
    constant,
    conv,
    einsum,
    elementwise,
    index,
    matmul,
    norm,
    pool,
    recurrent,
    reduce,
    resize,
    roi,
    scatter,
    shape,
)
from graphopt.importers.onnx.importer import Handler, import_graph

HANDLERS: dict[str, Handler] = {
    **activation.HANDLERS,
    **attention.HANDLERS,
    **constant.HANDLERS,
    **conv.HANDLERS,
    **einsum.HANDLERS,
    **elementwise.HANDLERS,
    **index.HANDLERS,
    **matmul.HANDLERS,
    **norm.HANDLERS,
    **pool.HANDLERS,
    **recurrent.HANDLERS,
    **reduce.HANDLERS,
    **resize.HANDLERS,
    **roi.HANDLERS,
    **scatter.HANDLERS,
    **shape.HANDLERS,
}


def import_onnx(source: Path | Any, inputs: ExampleInputs = None) -> fx.GraphModule:
    """Import a `.onnx` file or an `onnx.ModelProto`; see `graphopt.importers.import_model`."""
    return import_graph(source, inputs, HANDLERS)
