"""PyTorch models to graphs: `torch.export`, decompose, copy into graphopt's graph form."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export import _trace as _trace_module

from graphopt.errors import GraphoptError, InputError, ModelError
from graphopt.importers.inputs import ExampleInputs, as_tuple, convert, match_names
from graphopt.importers.torch_decompositions import decompositions
from graphopt.importers.torch_program import check_static, copy_program
from graphopt.importers.torch_source import error_origin

_NOISY_LOGGERS = (
    "torch.export",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
)


def import_module(module: nn.Module, inputs: ExampleInputs) -> fx.GraphModule:
    """Trace an `nn.Module` in eval mode on example inputs and import the result.

    Raises:
        ModelError: in training mode, or `torch.export` cannot trace it.
        InputError: the example inputs do not fit `forward`.
    """
    training = [name or type(module).__name__ for name, m in module.named_modules() if m.training]
    if training:
        shown = ", ".join(training[:5]) + (", …" if len(training) > 5 else "")
        raise ModelError(
            f"the model is in training mode ({len(training)} submodules: {shown})",
            hint="call model.eval() first",
        )
    args, kwargs = bind(module, inputs)
    gm = _import(_trace(module, args, kwargs))
    _check_runs(gm, module, args, kwargs)
    return gm


def import_program(
    program: ExportedProgram, inputs: ExampleInputs = None, *, source: str = "the ExportedProgram"
) -> fx.GraphModule:
    """Import an exported program; one with open dimensions is first traced again on `inputs`.

    Raises:
        ModelError: it has open dimensions and there are no example inputs, or changes state.
        InputError: the example inputs do not fit.
    """
    open_dimensions = check_static(program)
    if open_dimensions and inputs is None:
        raise ModelError(
            f"{source} leaves dimensions open: {'; '.join(open_dimensions)}",
            hint="give example inputs of the sizes to compile for, or export with fixed sizes",
        )
    if inputs is not None:
        module = program.module()
        args, kwargs = bind(module, inputs)
        _check_fit(program, args, kwargs)
        if open_dimensions:
            return _import(_trace(module, args, kwargs))
    return _import(program)


def load_program(path: Path, inputs: ExampleInputs) -> fx.GraphModule:
    """Import a .pt2 file written by `torch.export.save`."""
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise ModelError(
            f"{path} is not a readable .pt2 file: {_first_line(error)}",
            hint=f"write it with torch.export.save, with a torch no newer than {torch.__version__}",
        ) from error
    return import_program(program, inputs, source=str(path))


def bind(module: nn.Module, inputs: ExampleInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as the arguments of `forward`, in the order of its parameters.

    Raises:
        InputError: a wrong count or a wrong name.
    """
    signature = inspect.signature(module.forward)
    wanted = ", ".join(str(p) for p in signature.parameters.values()) or "nothing"
    if inputs is None:
        raise InputError(
            "a PyTorch model needs example inputs",
            hint=f"forward takes ({wanted}); give a tuple of arrays, or a dict by name",
        )
    if not isinstance(inputs, Mapping):
        args = tuple(convert(value, str(i)) for i, value in enumerate(as_tuple(inputs)))
        try:
            signature.bind(*args)
        except TypeError as error:
            raise InputError(
                f"{len(args)} example inputs do not fit the model: {error}",
                hint=f"forward takes ({wanted})",
            ) from None
        return args, {}

    values = {str(name): convert(value, str(name)) for name, value in inputs.items()}
    parameters = signature.parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        needed = [n for n, p in parameters.items() if p.default is p.empty or n in values]
        match_names(values, [n for n in needed if parameters[n].kind is not _VARIADIC])
    try:
        bound = signature.bind(**values)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit the model: {error}", hint=f"forward takes ({wanted})"
        ) from None
    return bound.args, bound.kwargs


_VARIADIC = inspect.Parameter.VAR_POSITIONAL


def _trace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(module, args, kwargs)
    except Exception as error:
        raise _explain(module, args, kwargs, error) from error


def _import(program: ExportedProgram) -> fx.GraphModule:
    try:
        with torch.no_grad(), _quiet():
            decomposed = program.run_decompositions(decompositions())
    except Exception as error:
        raise ModelError(
            f"PyTorch could not break the model up into simple operators: {_first_line(error)}",
            where=error_origin(error),
            hint="replace the operation at this line by simpler ones",
        ) from error
    return copy_program(decomposed)


def _check_runs(
    gm: fx.GraphModule, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Run the graph once: tracing sees shapes only and lets pass, for one, mixed dtypes."""
    leaves = torch.utils._pytree.tree_leaves((args, kwargs))
    try:
        with torch.no_grad():
            gm(*(leaf for leaf in leaves if isinstance(leaf, torch.Tensor)))
    except Exception as error:
        raise _explain(module, args, kwargs, error) from error


def _explain(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> GraphoptError:
    """What went wrong in `torch.export`, in plain words and with the user's line."""
    failure = _eager_failure(module, args, kwargs)
    if failure is not None:
        return InputError(
            f"the model itself fails on the example inputs: {_first_line(failure)}",
            where=error_origin(failure),
            hint=f"the inputs are {_described(args, kwargs)}",
        )
    text = f"{type(error).__name__} {error}"
    if "data-dependent" in text or "DataDependent" in text or "dynamic control flow" in text:
        return ModelError(
            "what the model computes next depends on the values of its tensors; a compiled model "
            "runs the same operations every time",
            where=error_origin(error),
            hint="decide by shapes or settings instead of values, compute both sides and choose "
            "with torch.where, or compile the parts on either side of the decision",
        )
    return ModelError(
        f"torch.export cannot trace the model: {_first_line(error)}",
        where=error_origin(error),
        hint="try torch.export.export(model, inputs) on its own; it must pass first",
    )


def _eager_failure(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Exception | None:
    """The exception the plain model raises on these inputs; run on a copy, so state stays."""
    try:
        duplicate = copy.deepcopy(module)
    except Exception:
        return None
    try:
        with torch.no_grad():
            duplicate(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    except Exception as error:
        return error
    return None


def _check_fit(program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Compare example inputs with what the program was exported for."""
    given = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs))]
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    names = list(program.graph_signature.user_inputs)
    if len(given) != len(names):
        raise InputError(f"the model takes {len(names)} inputs, {len(given)} were given")
    for name, tensor in zip(names, given, strict=True):
        expected = nodes[name].meta.get("val") if isinstance(name, str) and name in nodes else None
        if not isinstance(expected, torch.Tensor) or not isinstance(tensor, torch.Tensor):
            continue
        fits = tensor.dim() == expected.dim() and all(
            not isinstance(want, int) or want == have
            for want, have in zip(expected.shape, tensor.shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"input {name!r} has the shape {tuple(tensor.shape)}, "
                f"the model was exported for {tuple(expected.shape)}"
            )
        if tensor.dtype != expected.dtype:
            raise InputError(
                f"input {name!r} has the dtype {_dtype(tensor)}, "
                f"the model was exported for {_dtype(expected)}"
            )


def _described(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs))
    return ", ".join(
        f"{_dtype(leaf)}{tuple(leaf.shape)}" if isinstance(leaf, torch.Tensor) else repr(leaf)
        for leaf in leaves
    )


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's warnings about its own insides out of the user's terminal."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    # Of a model that it cannot trace it prints all it has seen, which may be thousands of lines.
    vars(_trace_module)["print"] = lambda *_, **__: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Recurrent layers keep a list of their weights, which is no state.
            warnings.filterwarnings("ignore", r"The tensor attributes? .*_flat_weights")
            yield
    finally:
        del vars(_trace_module)["print"]
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
