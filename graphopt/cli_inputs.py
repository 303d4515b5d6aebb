"""Arrays on the command line: input specifications, .npy and .npz files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from graphopt.errors import InputError

Array = npt.NDArray[Any]

# The name may hold colons itself (TensorFlow's `images:0`), so it is everything before the shape.
_SPEC = re.compile(r"(?P<name>.+):(?P<shape>scalar|\d+(?:x\d+)*)(?::(?P<dtype>[A-Za-z]\w*))?")


@dataclass(frozen=True)
class InputSpec:
    """One `--input` of `graphopt compile`; `dtype` is None where the user left it to the model."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None


def read_specs(texts: Sequence[str] | None) -> list[InputSpec]:
    """`parse_specs` of an option `Inputs`.

    Raises:
        typer.BadParameter: as there.
    """
    try:
        return parse_specs(texts or [])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--input") from error


def parse_specs(texts: Sequence[str]) -> list[InputSpec]:
    """`NAME:1x3x224x224[:dtype]` (or `NAME:scalar`) of each input.

    Raises:
        ValueError: one is not of this form, or a name comes twice.
    """
    specs: list[InputSpec] = []
    for text in texts:
        match = _SPEC.fullmatch(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not NAME:1x3x224x224[:dtype], for example image:1x3x224x224 or "
                "ids:1x64:int64"
            )
        dtype = match["dtype"]
        if dtype is not None:
            try:
                np.dtype(dtype)
            except TypeError:
                raise ValueError(f"{text!r}: there is no dtype {dtype!r}") from None
        shape = () if match["shape"] == "scalar" else tuple(map(int, match["shape"].split("x")))
        if any(spec.name == match["name"] for spec in specs):
            raise ValueError(f"input {match['name']!r} is given twice")
        specs.append(InputSpec(match["name"], shape, dtype))
    return specs


def example_inputs(specs: Sequence[InputSpec], model: Path) -> dict[str, Array] | None:
    """Arrays of these shapes: noise for floats, zeros (always a valid index) for all else."""
    if not specs:
        return None
    dtypes = {} if all(spec.dtype for spec in specs) else _onnx_dtypes(model)
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    for spec in specs:
        dtype = np.dtype(spec.dtype or dtypes.get(spec.name, "float32"))
        is_float = dtype.kind == "f"
        arrays[spec.name] = (
            np.asarray(rng.standard_normal(spec.shape), dtype)
            if is_float
            else np.zeros(spec.shape, dtype)
        )
    return arrays


def _onnx_dtypes(model: Path) -> Mapping[str, np.dtype[Any]]:
    """The dtypes an ONNX file declares for its inputs; empty if it cannot be read."""
    if model.suffix.lower() != ".onnx" or not model.is_file():
        return {}
    import onnx

    try:
        proto = onnx.load(model, load_external_data=False)
        return {
            value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            for value in proto.graph.input
            if value.type.HasField("tensor_type")
        }
    except Exception:
        return {}  # The importer reads it next, and says what is wrong with it.


def read_arrays(files: Sequence[str]) -> tuple[list[Array], dict[str, Array]]:
    """The arrays of `x.npy`, `NAME=x.npy` and `x.npz`: by position, and by name.

    Raises:
        InputError: a file is missing or not what its suffix says, or a name comes twice.
    """
    args: list[Array] = []
    named: dict[str, Array] = {}
    for text in files:
        name, separator, rest = text.partition("=")
        # A path may hold `=` itself.
        path = Path(rest) if separator and not Path(text).exists() else Path(text)
        content = _read(path)
        if isinstance(content, dict):
            found = content
        elif path != Path(text):
            found = {name: content}
        else:
            args.append(content)
            continue
        twice = sorted(set(found) & set(named))
        if twice:
            raise InputError(f"input {twice[0]!r} is given twice")
        named.update(found)
    return args, named


def _read(path: Path) -> Array | dict[str, Array]:
    hint = "save arrays with numpy.save (.npy) or numpy.savez (.npz)."
    if not path.is_file():
        raise InputError(f"there is no file {path}", hint=hint)
    try:
        content = np.load(path, allow_pickle=False)
        return content if isinstance(content, np.ndarray) else dict(content)
    except Exception as error:
        raise InputError(f"cannot read {path}: {error}", hint=hint) from error


def write_arrays(path: Path, names: Sequence[str], arrays: Sequence[Array]) -> None:
    """Write the arrays to an .npz by name, or a single one to an .npy.

    Raises:
        InputError: several arrays and an .npy, or another suffix.
    """
    if path.suffix == ".npz":
        # A numpy file opened by us: savez would read a name `file` as its own argument.
        _save_npz(path, dict(zip(names, arrays, strict=True)))
    elif path.suffix == ".npy" and len(arrays) == 1:
        np.save(path, arrays[0])
    else:
        raise InputError(
            f"cannot write {len(arrays)} outputs to {path}",
            hint="name an .npz (or, for a single output, an .npy).",
        )


def _save_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.asarray(array), allow_pickle=False)


def describe(name: str, array: Array) -> dict[str, Any]:
    """Facts about an array, as plain data; numbers are None where there is no finite one."""
    numbers = array.astype(np.float64) if array.dtype.kind in "fiub" else np.zeros(0)
    finite = numbers[np.isfinite(numbers)]
    largest = None
    if numbers.size and finite.size == numbers.size:
        largest = [int(place) for place in np.unravel_index(numbers.argmax(), numbers.shape)]
    return {
        "name": name,
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "mean": float(finite.mean()) if finite.size else None,
        "argmax": largest,
    }
