"""ONNX files and protos, read and checked before anything is imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx.external_data_helper import load_external_data_for_model, uses_external_data
from onnx.inliner import inline_local_functions
from onnx_graphsurgeon.logger import G_LOGGER

from graphopt.errors import ModelError

OLDEST_OPSET = 7
_DEFAULT_DOMAINS = ("", "ai.onnx")


def load(source: Path | onnx.ModelProto) -> tuple[gs.Graph, int]:
    """The model's graph in an order in which it can run, and its opset.

    Raises:
        ModelError: not an ONNX model, damaged, parts missing, too old or too new, or cyclic.
    """
    name = str(source) if isinstance(source, Path) else "the ModelProto"
    model = _read(source) if isinstance(source, Path) else source
    if isinstance(source, onnx.ModelProto) and _external(model):
        raise ModelError(
            f"{name} refers to tensors in other files: {', '.join(_external(model))}",
            hint="give the path of the .onnx file, or load it with external data",
        )
    if not model.graph.output:
        raise ModelError(
            f"{name} holds no ONNX model: its graph has no outputs",
            hint="the file may be empty or cut off; export it again",
        )
    opset = _opset(model, name)
    if model.functions:
        model = inline_local_functions(model)
    _check_wiring(model.graph, name)
    try:
        with _quiet():
            graph = gs.import_onnx(model)
            graph.cleanup(remove_unused_graph_inputs=False).toposort()
    except Exception as error:
        raise ModelError(
            f"{name} is not a valid ONNX graph: {_complaint(model) or error}",
            hint="check it with onnx.checker.check_model and export it again",
        ) from error
    return graph, opset


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's DecodeError, or a decoding error of a text form
        raise ModelError(
            f"{path} is not an ONNX file, or it is damaged", hint="export or download it again"
        ) from error
    missing = [location for location in _external(model) if not (path.parent / location).is_file()]
    if missing:
        raise ModelError(
            f"{path} keeps its weights in {', '.join(missing)}, which is not there",
            hint=f"put {missing[0]} next to the model, in {path.parent.absolute()}",
        )
    try:
        load_external_data_for_model(model, str(path.parent))
    except Exception as error:
        raise ModelError(f"the external data of {path} cannot be read: {error}") from error
    return model


def _external(model: onnx.ModelProto) -> list[str]:
    """The files that hold tensors outside the model's own."""
    tensors = list(model.graph.initializer)
    for node in model.graph.node:
        tensors += [attribute.t for attribute in node.attribute if attribute.HasField("t")]
    locations = [
        entry.value
        for tensor in tensors
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    return list(dict.fromkeys(locations))


def _opset(model: onnx.ModelProto, name: str) -> int:
    versions = [o.version for o in model.opset_import if o.domain in _DEFAULT_DOMAINS]
    newest = onnx.defs.onnx_opset_version()
    if not versions and all(node.domain not in _DEFAULT_DOMAINS for node in model.graph.node):
        return int(newest)
    if not versions:
        raise ModelError(
            f"{name} does not say which version of the ONNX operators it uses",
            hint="set opset_import and save it again",
        )
    version = int(max(versions))
    if version > newest:
        raise ModelError(
            f"{name} uses opset {version}; the installed onnx {onnx.__version__} knows up to "
            f"{newest}",
            hint=f"install a newer onnx, or export with opset_version={newest}",
        )
    if version < OLDEST_OPSET:
        raise ModelError(
            f"{name} uses opset {version}, older than the oldest supported, {OLDEST_OPSET}",
            hint="convert it with onnx.version_converter.convert_version(model, 13)",
        )
    return version


def _check_wiring(graph: onnx.GraphProto, name: str) -> None:
    """Every tensor read must be made somewhere, once, and there must be no cycle."""
    made = {value.name for value in graph.input} | {t.name for t in graph.initializer}
    made |= {tensor.values.name for tensor in graph.sparse_initializer} | {""}
    producers: dict[str, onnx.NodeProto] = {}
    for node in graph.node:
        for output in filter(None, node.output):
            if output in producers or output in {value.name for value in graph.input}:
                raise ModelError(
                    f"{name} is not a valid ONNX graph: {output!r} is made twice",
                    where=(node_origin(node),),
                )
            producers[output] = node
    for node in graph.node:
        unknown = [i for i in node.input if i not in made and i not in producers]
        if unknown:
            raise ModelError(
                f"{name} is not a valid ONNX graph: nothing makes {unknown[0]!r}",
                where=(node_origin(node),),
                hint="the graph was cut wrongly; export it again",
            )
    absent = [v.name for v in graph.output if v.name not in made and v.name not in producers]
    if absent:
        raise ModelError(
            f"{name} is not a valid ONNX graph: nothing makes its output {absent[0]!r}",
            hint="the graph was cut wrongly; export it again",
        )
    _check_acyclic(graph, producers, name)


def _check_acyclic(graph: onnx.GraphProto, producers: dict[str, onnx.NodeProto], name: str) -> None:
    waiting = {
        id(node): {id(producers[i]) for i in node.input if i in producers} for node in graph.node
    }
    readers: dict[int, list[int]] = {key: [] for key in waiting}
    for key, needed in waiting.items():
        for producer in needed:
            readers[producer].append(key)
    ready = [key for key, needed in waiting.items() if not needed]
    done = set()
    while ready:
        key = ready.pop()
        done.add(key)
        for reader in readers[key]:
            waiting[reader].discard(key)
            if not waiting[reader]:
                ready.append(reader)
    stuck = [node for node in graph.node if id(node) not in done]
    if stuck:
        raise ModelError(
            f"{name} is not a valid ONNX graph: it has a cycle",
            where=tuple(node_origin(node) for node in stuck[:5]),
        )


def node_origin(node: onnx.NodeProto) -> str:
    """How errors and reports name a node of the file."""
    return describe(node.op_type, node.name, list(node.output))


def describe(op: str, name: str, outputs: list[str]) -> str:
    """`ONNX node 'Conv_3' (Conv)`, or by its output where the node has no name."""
    if name:
        return f"ONNX node {name!r} ({op})"
    return f"ONNX node making {outputs[0] if outputs else ''!r} ({op})"


def _complaint(model: onnx.ModelProto) -> str:
    """What onnx's own checker says, or an empty string."""
    try:
        onnx.checker.check_model(model)
    except Exception as error:
        return str(error).strip().splitlines()[0] if str(error).strip() else ""
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep onnx-graphsurgeon's warnings out of the user's terminal; we check for ourselves."""
    before = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.ERROR
    try:
        yield
    finally:
        G_LOGGER.severity = before
