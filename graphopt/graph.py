"""The Graph level: a `torch.fx.GraphModule` over ATen ops, and helpers that all code edits it with.

What every graph at every stage keeps to (the verifier in `graphopt.passes` enforces it):

- nodes are `placeholder`, `get_attr` (a constant: a buffer registered directly on the module),
  `call_function` of an `OpOverload`, and one `output` whose argument is a tuple of nodes;
- `node.meta["val"]` is a tensor on the `meta` device: shape and dtype of the node's one result;
- `node.meta["origin"]` is a tuple of strings: where in the user's model the node comes from;
- `gm.meta["input_names"]` and `gm.meta["output_names"]` name the interface in the model's order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import fx

Origin = tuple[str, ...]

NAMESPACES = ("aten", "quantized_decomposed", "graphopt")
"""Of the operators that a graph may call."""


def empty_graph() -> fx.GraphModule:
    """A graph module with no nodes, ready to be built."""
    gm = fx.GraphModule(torch.nn.Module(), fx.Graph())
    gm.meta["input_names"] = ()
    gm.meta["output_names"] = ()
    return gm


def value(node: fx.Node) -> torch.Tensor:
    """The node's result as a tensor on the meta device (shape and dtype, no data)."""
    return cast(torch.Tensor, node.meta["val"])


def shape(node: fx.Node) -> tuple[int, ...]:
    """The node's static shape."""
    return tuple(int(s) for s in value(node).shape)


def origin(node: fx.Node) -> Origin:
    """Where in the user's model this node comes from; empty if nothing is known."""
    return cast(Origin, node.meta.get("origin", ()))


def merge_origins(nodes: Iterable[fx.Node]) -> Origin:
    """All origins of the nodes, in order, each once."""
    return tuple(dict.fromkeys(place for node in nodes for place in origin(node)))


def infer(target: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """Shape and dtype that `target` gives for these arguments, as a meta tensor.

    Raises whatever the op's own shape rule raises when the arguments do not fit.
    """
    meta_args = fx.map_arg(args, value)
    meta_kwargs = fx.map_arg(kwargs, value)
    with torch.no_grad():
        return cast(torch.Tensor, target(*meta_args, **meta_kwargs))


def call(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
    *,
    origin: Origin,
) -> fx.Node:
    """Insert `target(*args, **kwargs)` at the graph's insertion point, with its meta filled in."""
    node = graph.call_function(target, args, kwargs or {})
    node.meta["val"] = infer(target, args, kwargs or {})
    node.meta["origin"] = origin
    return node


def add_constant(gm: fx.GraphModule, hint: str, tensor: torch.Tensor, *, origin: Origin) -> fx.Node:
    """Register `tensor` under a fresh name like `hint` and insert the `get_attr` that reads it."""
    stem = re.sub(r"\W+", "_", hint).strip("_") or "constant"
    if stem[0].isdigit():
        stem = f"constant_{stem}"
    name = stem
    serial = 0
    while hasattr(gm, name):
        serial += 1
        name = f"{stem}_{serial}"
    gm.register_buffer(name, tensor.detach())
    node = gm.graph.get_attr(name)
    node.meta["val"] = tensor.detach().to("meta")
    node.meta["origin"] = origin
    return node


def constant(gm: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor a `get_attr` node reads, or None if `node` is not one."""
    if isinstance(node, fx.Node) and node.op == "get_attr":
        return cast(torch.Tensor, getattr(gm, cast(str, node.target)))
    return None


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    """The input nodes in order."""
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def output_node(gm: fx.GraphModule) -> fx.Node:
    """The graph's one output node."""
    node: fx.Node = next(n for n in reversed(gm.graph.nodes) if n.op == "output")
    return node


def outputs(gm: fx.GraphModule) -> Sequence[fx.Node]:
    """The nodes whose values the graph returns, in order."""
    return cast(Sequence[fx.Node], output_node(gm).args[0])


def replace(node: fx.Node, new: fx.Node) -> None:
    """Let every user of `node` read `new`, and erase `node`; `new` takes over its origins."""
    new.meta["origin"] = merge_origins((new, node))
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def remove_unused_constants(gm: fx.GraphModule) -> None:
    """Drop the tensors no `get_attr` node reads any more."""
    used = {node.target for node in gm.graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in gm.named_buffers(recurse=False) if name not in used]:
        delattr(gm, name)
