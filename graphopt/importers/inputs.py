"""Example inputs as users give them (numpy or torch, one, a tuple or a dict) to torch tensors."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from graphopt.errors import InputError

ExampleInputs: TypeAlias = (
    torch.Tensor | np.ndarray[Any, Any] | Sequence[Any] | Mapping[str, Any] | None
)


def to_tensor(array: np.ndarray[Any, Any] | np.generic, name: str) -> torch.Tensor:
    """A numpy array as a torch tensor with a copy of its values.

    Raises:
        InputError: torch has no such dtype (strings, objects).
    """
    if array.dtype.name == "bfloat16":  # an extension type that torch does not take from numpy
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    try:
        return torch.from_numpy(np.array(array))
    except TypeError:
        raise InputError(
            f"input {name!r} has the dtype {array.dtype}, which no model can take",
            hint="give numbers, for example array.astype(numpy.float32)",
        ) from None


def convert(value: Any, name: str) -> Any:
    """`value` with every numpy array in it, however nested, turned into a torch tensor."""
    if isinstance(value, np.ndarray | np.generic):
        return to_tensor(value, name)
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: convert(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(convert(item, f"{name}[{i}]") for i, item in enumerate(value)))
    if isinstance(value, list | tuple):
        return type(value)(convert(item, f"{name}[{i}]") for i, item in enumerate(value))
    return value


def as_tuple(inputs: ExampleInputs) -> tuple[Any, ...]:
    """Inputs that are not a dict as a tuple of positional inputs."""
    if isinstance(inputs, torch.Tensor | np.ndarray | np.generic):
        return (inputs,)
    if isinstance(inputs, list | tuple):
        return tuple(inputs)
    raise InputError(
        f"example inputs are a {type(inputs).__name__}",
        hint="give an array or tensor, a tuple of them, or a dict from input name to array",
    )


def match_names(given: Mapping[str, Any], expected: Sequence[str]) -> None:
    """Check that the dict's keys are the model's input names.

    Raises:
        InputError: a name is missing or unknown; the message lists what the model expects.
    """
    unknown = [str(name) for name in given if name not in expected]
    missing = [name for name in expected if name not in given]
    if not unknown and not missing:
        return
    parts = []
    if unknown:
        parts.append(f"the model has no input {_listed(unknown)}")
    if missing:
        parts.append(f"the input {_listed(missing)} is missing")
    near = [
        close[0]
        for name in unknown
        if (close := difflib.get_close_matches(name, list(expected), n=1))
    ]
    hint = f"the model's inputs are {_listed(expected)}"
    if near:
        hint += f"; did you mean {_listed(near)}?"
    raise InputError(" and ".join(parts), hint=hint)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(repr(name) for name in names) or "(none)"
