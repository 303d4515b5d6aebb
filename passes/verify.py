"""The verifier: what every graph must hold after import and after every pass."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt import graph as g
from graphopt.errors import VerifyError
from graphopt.passes._nodes import bind, calls, freeze, gives_several, parameters, results


@dataclass(frozen=True)
class Problem:
    """One broken invariant and the place it was found at."""

    what: str
    origin: g.Origin = ()


@dataclass(frozen=True)
class Interface:
    """What a caller sees of a graph; no pass may change it. Types are (shape, dtype)."""

    input_names: tuple[str, ...]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    output_names: tuple[str, ...]
    outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]


@dataclass
class Verifier:
    """Checks graphs; remembers derived shapes, so that checking after each pass stays cheap."""

    _derived: dict[Any, tuple[torch.Tensor, ...] | str | None] = field(default_factory=dict)

    def check(self, gm: fx.GraphModule, interface: Interface | None = None) -> list[Problem]:
        """All problems of the graph; `interface` is the one it must still have."""
        problems = list(_form(gm))
        if problems:
            # Types of a malformed graph cannot be derived without following broken edges.
            return problems
        constants = dict(gm.named_buffers(recurse=False))
        for node in gm.graph.nodes:
            problems.extend(_node(gm, node, constants))
            if node.op == "call_function" and not problems:
                problems.extend(self._types(node))
        if interface is not None and not problems:
            problems.extend(_interface(interface, interface_of(gm)))
        if not problems:
            problems.extend(_lint(gm))
        return problems

    def _types(self, node: fx.Node) -> Iterator[Problem]:
        derived = self._derive(node)
        if derived is None:
            return
        if isinstance(derived, str):
            yield _at(node, f"its arguments do not fit {node.target}: {derived}")
            return
        stored = results(node)
        if len(stored) != len(derived):
            yield _at(
                node, f"has {len(stored)} results in meta['val'], the op gives {len(derived)}"
            )
        for old, new in zip(stored, derived, strict=False):
            if tuple(old.shape) != tuple(new.shape):
                yield _at(
                    node,
                    f"meta['val'] says shape {list(old.shape)}, the op gives {list(new.shape)}",
                )
            if old.dtype != new.dtype:
                yield _at(node, f"meta['val'] says {old.dtype}, the op gives {new.dtype}")

    def _derive(self, node: fx.Node) -> tuple[torch.Tensor, ...] | str | None:
        """Result types by the op's own rule, why it rejects its arguments, or None if unknown."""
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            return (results(source)[index],)  # type: ignore[index]
        key = (node.target, freeze(node.args, _type_key), freeze(node.kwargs, _type_key))
        if key not in self._derived:
            self._derived[key] = _infer(node)
        return self._derived[key]


def verify(
    gm: fx.GraphModule,
    *,
    stage: str = "import",
    interface: Interface | None = None,
    verifier: Verifier | None = None,
) -> None:
    """Raise a VerifyError that lists every problem of the graph; `stage` names who made it."""
    problems = (verifier or Verifier()).check(gm, interface)
    if not problems:
        return
    listing = "".join(
        f"\n  - {p.what}" + (f" (at {'; '.join(p.origin)})" if p.origin else "") for p in problems
    )
    raise VerifyError(
        f"the graph is broken after {stage}: {len(problems)} problem(s){listing}",
        where=tuple(dict.fromkeys(place for p in problems for place in p.origin)),
        hint=f"this is a bug in {stage}, not in your model: please report it",
    )


def interface_of(gm: fx.GraphModule) -> Interface:
    """The graph's inputs and outputs: names, order, shapes, dtypes."""
    return Interface(
        tuple(gm.meta["input_names"]),
        tuple((g.shape(node), g.value(node).dtype) for node in g.placeholders(gm)),
        tuple(gm.meta["output_names"]),
        tuple((g.shape(node), g.value(node).dtype) for node in g.outputs(gm)),
    )


def _at(node: fx.Node, what: str) -> Problem:
    return Problem(f"{node.name}: {what}", g.origin(node))


def _form(gm: fx.GraphModule) -> Iterator[Problem]:
    """Node kinds, edges and order, the output, the interface's names."""
    seen: set[fx.Node] = set()
    nodes = set(gm.graph.nodes)
    outputs = [node for node in gm.graph.nodes if node.op == "output"]
    last: fx.Node | None = None
    for node in gm.graph.nodes:
        last = node
        if node.op not in ("placeholder", "get_attr", "call_function", "output"):
            yield _at(node, f"a node of kind {node.op} is not allowed")
        for source in node.all_input_nodes:
            if source not in nodes:
                yield _at(node, f"reads {source.name}, which is not in the graph")
            elif source not in seen:
                yield _at(node, f"reads {source.name} before it is computed")
            if node not in source.users:
                yield _at(node, f"is missing among the users of {source.name}")
        if node.op != "output":
            yield from _value(node)
        seen.add(node)
    if last is None or [last] != outputs:
        yield Problem(f"a graph ends in exactly one output node, this one has {len(outputs)}")
        return
    returned: Any = last.args[0] if last.args else None
    if not (isinstance(returned, tuple | list) and all(isinstance(n, fx.Node) for n in returned)):
        yield Problem(f"the output's argument must be a tuple of nodes, not {returned!r}")
        return
    for kind, count in (("input", len(g.placeholders(gm))), ("output", len(returned))):
        names = gm.meta.get(f"{kind}_names")
        if names is None or len(names) != count or len(set(names)) != count:
            yield Problem(f"meta['{kind}_names'] is {names!r}, the graph has {count} {kind}s")


def _value(node: fx.Node) -> Iterator[Problem]:
    """`meta["val"]`: a static tensor on the meta device; a tuple only where getitem reads it."""
    if "val" not in node.meta:
        yield _at(node, "has no meta['val']")
        return
    if gives_several(node) and not all(calls(user, operator.getitem) for user in node.users):
        yield _at(node, "has several results, and something else than getitem reads them")
    for val in results(node):
        if not isinstance(val, torch.Tensor):
            yield _at(node, f"meta['val'] is {type(val).__name__}, not a tensor")
        elif val.device.type != "meta":
            yield _at(node, f"meta['val'] is on {val.device}, not on the meta device")
        elif not all(isinstance(size, int) for size in val.shape):
            yield _at(node, f"its shape is not static: {list(val.shape)}")


def _node(
    gm: fx.GraphModule, node: fx.Node, constants: dict[str, torch.Tensor]
) -> Iterator[Problem]:
    """What holds for a node by itself: its origin, a legal target, resolvable, right parameters."""
    places = node.meta.get("origin")
    if node.op in ("get_attr", "call_function") and not (
        isinstance(places, tuple) and places and all(isinstance(p, str) for p in places)
    ):
        yield _at(node, f"has no origin (meta['origin'] is {places!r})")
    if node.op == "get_attr":
        yield from _constant(constants, node)
    if node.op == "call_function":
        yield from _target(gm, node)


def _constant(constants: dict[str, torch.Tensor], node: fx.Node) -> Iterator[Problem]:
    tensor = constants.get(str(node.target))
    if tensor is None:
        yield _at(node, f"reads {node.target!r}, which is not a buffer of the module")
        return
    val = g.value(node)
    if tuple(val.shape) != tuple(tensor.shape) or val.dtype != tensor.dtype:
        yield _at(
            node,
            f"meta['val'] says {val.dtype}{list(val.shape)}, "
            f"the constant is {tensor.dtype}{list(tensor.shape)}",
        )


def _target(gm: fx.GraphModule, node: fx.Node) -> Iterator[Problem]:
    target = node.target
    if target is operator.getitem:
        source, index = node.args
        if not (isinstance(source, fx.Node) and gives_several(source)):
            yield _at(node, "getitem of something that has one result")
        elif not (isinstance(index, int) and 0 <= index < len(results(source))):
            yield _at(node, f"getitem {index!r} of {len(results(source))} results")
        return
    if not isinstance(target, OpOverload):
        yield _at(node, f"calls {target!r}, which is not a torch operator")
        return
    if target.namespace not in g.NAMESPACES:
        yield _at(node, f"calls {target}, only {', '.join(g.NAMESPACES)} operators are legal")
        return
    names = [name for name, _, _, _ in parameters(target)]
    positional = [name for name, keyword_only, _, _ in parameters(target) if not keyword_only]
    unknown = sorted(set(node.kwargs) - set(names))
    if unknown:
        yield _at(node, f"{target} has no parameter {', '.join(unknown)}")
    if len(node.args) > len(positional):
        yield _at(
            node, f"{target} takes {len(positional)} positional arguments, not {len(node.args)}"
        )
    elif target.namespace == "quantized_decomposed" and not unknown:
        yield from _quantization(gm, node)


def _quantization(gm: fx.GraphModule, node: fx.Node) -> Iterator[Problem]:
    """Scales are positive and finite, zero points and clamping bounds fit the integer dtype."""
    bound = bind(node)
    if not {"quant_min", "quant_max", "dtype"} <= bound.keys() or not (
        {"scale", "scales"} & bound.keys()
    ):
        return
    dtype, low, high = bound["dtype"], bound["quant_min"], bound["quant_max"]
    if not isinstance(dtype, torch.dtype) or dtype.is_floating_point or dtype == torch.bool:
        yield _at(node, f"quantizes to {dtype}, which is not an integer dtype")
        return
    info = torch.iinfo(dtype)
    if not info.min <= low < high <= info.max:
        yield _at(node, f"clamps to {low}..{high}, {dtype} holds {info.min}..{info.max}")
    scales = _numbers(gm, bound.get("scale", bound.get("scales")))
    points = _numbers(gm, bound.get("zero_point", bound.get("zero_points")))
    for scale in scales:
        if not (math.isfinite(scale) and scale > 0):
            yield _at(node, f"scale {scale} is not a positive finite number")
            break
    for point in points:
        if not low <= point <= high:
            yield _at(node, f"zero point {point:g} is outside {low}..{high}")
            break
    source = bound["input"]
    if "axis" in bound and isinstance(source, fx.Node):
        axis, sizes = bound["axis"], g.shape(source)
        if not -len(sizes) <= axis < len(sizes):
            yield _at(node, f"axis {axis} of a tensor of shape {list(sizes)}")
        elif scales and len(scales) != sizes[axis]:
            yield _at(node, f"{len(scales)} scales for {sizes[axis]} channels")


def _numbers(gm: fx.GraphModule, argument: Any) -> list[float]:
    """The numbers of a scalar or constant argument; none if only known at run time."""
    if isinstance(argument, int | float):
        return [argument]
    tensor = g.constant(gm, argument)
    return [] if tensor is None else tensor.reshape(-1).tolist()


def _interface(before: Interface, after: Interface) -> Iterator[Problem]:
    for what in ("input_names", "inputs", "output_names", "outputs"):
        old, new = getattr(before, what), getattr(after, what)
        if old != new:
            yield Problem(f"the interface changed: {what} were {old}, are {new}")


def _lint(gm: fx.GraphModule) -> Iterator[Problem]:
    try:
        gm.graph.lint()
    except (RuntimeError, ValueError, AssertionError) as error:
        yield Problem(f"torch.fx finds the graph broken: {error}")


def _type_key(node: fx.Node) -> Any:
    return tuple((tuple(val.shape), val.dtype) for val in results(node))


def _infer(node: fx.Node) -> tuple[torch.Tensor, ...] | str | None:
    assert isinstance(node.target, OpOverload)
    kwargs = dict(node.kwargs)
    if any(
        name == "device" and only_keyword for name, only_keyword, _, _ in parameters(node.target)
    ):
        kwargs["device"] = torch.device("meta")
    try:
        derived: Any = g.infer(node.target, node.args, kwargs)
    except NotImplementedError:
        return None  # no shape rule, or the shape depends on data: lowering reports such ops
    except Exception as error:
        # Any other error is the op rejecting these arguments, and shape rules raise all kinds.
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if isinstance(derived, torch.Tensor):
        return (derived,)
    if isinstance(derived, tuple | list) and all(isinstance(d, torch.Tensor) for d in derived):
        return tuple(derived)
    return None
