"""Importers: a user's model, from PyTorch or ONNX, to the one graph form of `graphopt.graph`."""

from __future__ import annotations

import difflib
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from graphopt.errors import ModelError
from graphopt.importers.inputs import ExampleInputs

__all__ = ["ExampleInputs", "import_model"]

SUFFIXES = (".onnx", ".pt2")


def import_model(model: object, inputs: ExampleInputs = None) -> fx.GraphModule:
    """The model as a graph over ATen operators with static shapes.

    Args:
        model: an `nn.Module` in eval mode, a `torch.export.ExportedProgram`, the path of a `.pt2`
            or `.onnx` file, or an `onnx.ModelProto`. It is left as it is.
        inputs: example inputs, numpy arrays or torch tensors: one, a tuple in the model's order,
            or a dict by input name. An `nn.Module` needs them; an ONNX model only where it leaves
            dimensions open. Their shapes and dtypes become the compiled model's.

    Raises:
        ModelError: the model cannot be read, traced, or has open dimensions.
        InputError: the example inputs do not fit the model.
        UnsupportedError: it uses operators that cannot be imported; lists all of them.
    """
    if isinstance(model, nn.Module):
        from graphopt.importers.torch_export import import_module

        return import_module(model, inputs)
    if isinstance(model, ExportedProgram):
        from graphopt.importers.torch_export import import_program

        return import_program(model, inputs)
    if isinstance(model, str | PathLike):
        return _import_file(Path(model), inputs)
    if _is_model_proto(model):
        from graphopt.importers.onnx import import_onnx

        return import_onnx(model, inputs)
    raise ModelError(
        f"cannot import a {type(model).__module__}.{type(model).__qualname__}",
        hint="give an nn.Module, a torch.export.ExportedProgram, a path of a .pt2 or .onnx file, "
        "or an onnx.ModelProto",
    )


def _import_file(path: Path, inputs: ExampleInputs) -> fx.GraphModule:
    if not path.exists():
        near = []
        if path.parent.is_dir():
            candidates = [p.name for p in path.parent.iterdir() if p.suffix.lower() in SUFFIXES]
            near = difflib.get_close_matches(path.name, candidates, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "check the path"
        raise ModelError(f"there is no file {path}", hint=hint)
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a model file", hint="give a .onnx or .pt2 file")
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from graphopt.importers.onnx import import_onnx

        return import_onnx(path, inputs)
    if suffix == ".pt2":
        from graphopt.importers.torch_export import load_program

        return load_program(path, inputs)
    if suffix in (".pt", ".pth", ".safetensors"):
        raise ModelError(
            f"{path} holds weights or TorchScript, which say too little about the model",
            hint="build the nn.Module, load the weights into it and give the module, or save it "
            "with torch.export.save(torch.export.export(module, inputs), 'model.pt2')",
        )
    raise ModelError(
        f"{path} has the unknown suffix {path.suffix or '(none)'!r}",
        hint=f"the files that can be imported end in {' or '.join(SUFFIXES)}",
    )


def _is_model_proto(model: Any) -> bool:
    """Whether this is an onnx.ModelProto, asked without importing onnx."""
    return type(model).__name__ == "ModelProto" and hasattr(model, "opset_import")
