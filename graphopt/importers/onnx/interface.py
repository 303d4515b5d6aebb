"""The inputs of an ONNX model: their static shapes, from the file and from the user's examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_graphsurgeon as gs
import torch

from graphopt.errors import InputError, ModelError
from graphopt.importers.inputs import ExampleInputs, as_tuple, match_names, to_tensor
from graphopt.importers.onnx.dtypes import torch_dtype
from graphopt.importers.onnx.values import Refused

Spec = tuple[tuple[int, ...], torch.dtype]


def input_specs(graph: gs.Graph, inputs: ExampleInputs) -> dict[str, Spec]:
    """Shape and dtype of each graph input, by name.

    Raises:
        ModelError: dimensions are open and no example says their size.
        InputError: examples of a wrong name, count, rank, size or dtype.
    """
    kinds = {tensor.name: _dtype(tensor) for tensor in graph.inputs}
    examples = _examples(graph, inputs)
    _refuse_open(graph, examples)
    specs: dict[str, Spec] = {}
    bound: dict[str, tuple[str, int]] = {}
    for tensor in graph.inputs:
        given = examples.get(tensor.name)
        if given is None:
            specs[tensor.name] = (tuple(tensor.shape), kinds[tensor.name])
            continue
        _check(tensor, kinds[tensor.name], given)
        for size, wanted in zip(given.shape, tensor.shape or (), strict=False):
            if isinstance(wanted, str) and wanted not in ("", "?"):
                first, known = bound.setdefault(wanted, (tensor.name, int(size)))
                if known != size:
                    raise InputError(
                        f"inputs {first!r} and {tensor.name!r} share the dimension {wanted!r}, "
                        f"which is {known} in one and {size} in the other"
                    )
        specs[tensor.name] = (tuple(given.shape), kinds[tensor.name])
    return specs


def _examples(graph: gs.Graph, inputs: ExampleInputs) -> dict[str, torch.Tensor]:
    names = [tensor.name for tensor in graph.inputs]
    if inputs is None:
        return {}
    if isinstance(inputs, Mapping):
        fixed = [t.name for t in graph.inputs if not _open_axes(t) and t.shape is not None]
        match_names(inputs, [n for n in names if n in inputs or n not in fixed] or names)
        pairs = [(name, inputs[name]) for name in names if name in inputs]
    else:
        values = as_tuple(inputs)
        if len(values) != len(names):
            raise InputError(
                f"the model has {len(names)} inputs, {len(values)} examples were given",
                hint=f"its inputs are, in order, {', '.join(map(repr, names))}",
            )
        pairs = list(zip(names, values, strict=True))
    return {name: _tensor(value, name) for name, value in pairs}


def _tensor(value: Any, name: str) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach()
    if hasattr(value, "__array__"):
        import numpy as np

        return to_tensor(np.asarray(value), name)
    raise InputError(
        f"the example for input {name!r} is a {type(value).__name__}",
        hint="give a numpy array or a torch tensor",
    )


def _check(tensor: gs.Variable, kind: torch.dtype, given: torch.Tensor) -> None:
    wanted = tensor.shape
    if wanted is not None:
        fits = len(wanted) == given.dim() and all(
            _is_open(want) or want == have for want, have in zip(wanted, given.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"input {tensor.name!r} has the shape {tuple(given.shape)}, the model takes "
                f"{_shape_text(tensor)}"
            )
    if given.dtype != kind:
        name = str(kind).removeprefix("torch.")
        raise InputError(
            f"input {tensor.name!r} has the dtype {str(given.dtype).removeprefix('torch.')}, the "
            f"model takes {name}",
            hint=f"convert it, for numpy with array.astype({name!r})",
        )


def _refuse_open(graph: gs.Graph, examples: Mapping[str, torch.Tensor]) -> None:
    unknown = [
        tensor
        for tensor in graph.inputs
        if tensor.name not in examples and (tensor.shape is None or _open_axes(tensor))
    ]
    if not unknown:
        return
    listed = "; ".join(f"{tensor.name!r} {_shape_text(tensor)}" for tensor in unknown)
    sizes: set[str] = set()
    calls = []
    for tensor in unknown:
        shape, names = _example_shape(tensor)
        sizes.update(names)
        kind = str(_dtype(tensor)).removeprefix("torch.")
        calls.append(f"{tensor.name!r}: numpy.zeros({shape}, {kind!r})")
    ordered = ", ".join(sorted(sizes))
    raise ModelError(
        f"the model leaves dimensions open: {listed}",
        hint=f"give example inputs of the sizes to compile for: inputs={{{', '.join(calls)}}}"
        + (f", with numbers for {ordered}" if sizes else ""),
    )


def _example_shape(tensor: gs.Variable) -> tuple[str, list[str]]:
    """The shape as Python source, open dimensions as letters, and those letters."""
    if tensor.shape is None:
        return "(...)", []
    parts, names = [], []
    for axis, size in enumerate(tensor.shape):
        if _is_open(size):
            names.append("N" if axis == 0 else f"D{axis}")
            parts.append(names[-1])
        else:
            parts.append(str(size))
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})", names


def _shape_text(tensor: gs.Variable) -> str:
    if tensor.shape is None:
        return "(of unknown rank)"
    parts = [str(s) if s not in (None, "") else "?" for s in tensor.shape]
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _open_axes(tensor: gs.Variable) -> list[int]:
    return [i for i, size in enumerate(tensor.shape or ()) if _is_open(size)]


def _is_open(size: object) -> bool:
    return not isinstance(size, int) or size < 0


def _dtype(tensor: gs.Variable) -> torch.dtype:
    if getattr(tensor, "type", "tensor_type") not in ("tensor_type", None):
        raise ModelError(f"input {tensor.name!r} is a {tensor.type}, not a tensor")
    try:
        return torch_dtype(tensor.dtype)
    except (Refused, TypeError, ValueError, KeyError) as error:
        raise ModelError(f"input {tensor.name!r} cannot be used: {error}") from error
