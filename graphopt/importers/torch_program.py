"""A decomposed `ExportedProgram`, node by node, to a graph in graphopt's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from graphopt import graph as G
from graphopt.errors import ModelError, UnsupportedError
from graphopt.importers.torch_source import node_origin

aten = torch.ops.aten

# These say something about tensors, mostly while tracing, and compute nothing.
CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
)
SAME_VALUE = (
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh.default,
    aten.lift_fresh_copy.default,
    torch.ops.prims.copy_strided.default,
)


def check_static(program: ExportedProgram) -> list[str]:
    """The inputs with open dimensions, for example `x: (s0, 3, 224, 224)`."""
    return [
        f"{node.name}: ({', '.join(str(size) for size in node.meta['val'].shape)})"
        for node in program.graph.nodes
        if node.op == "placeholder"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and not _is_static(node.meta["val"])
    ]


def copy_program(program: ExportedProgram) -> fx.GraphModule:
    """The program, whose own graph loses what no result needs, as a graph with copies of weights.

    Raises:
        ModelError: it changes state, returns something other than tensors, or its shapes depend on
            values.
        UnsupportedError: it holds nodes that are not ATen operators.
    """
    _check_interface(program)
    _drop_unneeded(program.graph)
    _check_nodes(program)
    return _Copier(program).run()


def _drop_unneeded(graph: fx.Graph) -> None:
    """Drop what says something about tensors, and what is computed for that or for nothing."""
    for node in list(graph.nodes):
        if node.target in CHECKS:
            graph.erase_node(node)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


class _Copier:
    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        self.gm = G.empty_graph()
        self.env: dict[fx.Node, Any] = {}
        # Tied weights are one tensor under several names: they stay one constant.
        self.constants: dict[tuple[Any, ...], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        names = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind is not InputKind.USER_INPUT:
                    self.env[node] = self.weight(spec.target)
                elif isinstance(spec.arg, TensorArgument):
                    self.env[node] = self.gm.graph.placeholder(node.name)
                    self.fill_meta(self.env[node], node)
                    names.append(node.name)
                else:
                    self.env[node] = spec.arg.value  # None or a number, traced as it was given
            elif node.op == "call_function":
                self.operator(node)
            elif node.op == "get_attr":
                self.env[node] = self.weight(node.target)
        self.gm.meta["input_names"] = tuple(names)
        self.outputs()
        self.drop_unused()
        self.gm.graph.lint()
        self.gm.recompile()
        return self.gm

    def weight(self, name: str) -> fx.Node:
        tensor = self.program.state_dict.get(name)
        if tensor is None:
            tensor = self.program.constants[name]
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        known = self.constants.get(key) if tensor.numel() else None
        if known is None:
            # A copy: nothing done to the graph may reach the user's model.
            own = tensor.to("cpu", copy=True).contiguous()
            known = G.add_constant(self.gm, name, own, origin=(name,))
            self.constants[key] = known
        return known

    def operator(self, node: fx.Node) -> None:
        target: Any = node.target
        args: Any = fx.map_arg(node.args, lambda n: self.env[n])
        kwargs: Any = fx.map_arg(node.kwargs, lambda n: self.env[n])
        if node.target in SAME_VALUE:
            self.env[node] = args[0]
            return
        if node.target is aten._native_batch_norm_legit_no_training.default:
            self.env[node] = (self.batch_norm(node, args),)
            return
        if _is_getitem(node) and isinstance(args[0], tuple):
            self.env[node] = args[0][args[1]]
            return
        self.env[node] = self.gm.graph.call_function(target, args, kwargs)
        self.fill_meta(self.env[node], node)

    def batch_norm(self, node: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        x, weight, bias, mean, variance, _momentum, eps = args
        return G.call(
            self.gm.graph,
            aten.batch_norm.default,
            (x, weight, bias, mean, variance, False, 0.0, eps, False),
            origin=node_origin(node),
        )

    def fill_meta(self, new: fx.Node, old: fx.Node) -> None:
        new.meta["val"] = pytree.tree_map_only(torch.Tensor, _on_meta, old.meta["val"])
        # Views that functionalization writes again for an output have no origin of their own.
        operands = [place for operand in new.all_input_nodes for place in G.origin(operand)]
        new.meta["origin"] = node_origin(old) or tuple(dict.fromkeys(operands))

    def outputs(self) -> None:
        node = G.output_node(self.program.graph_module)
        listed = cast(Sequence[Any], node.args[0])
        results = [self.env[item] if isinstance(item, fx.Node) else None for item in listed]
        names = output_names(self.program, len(results))
        kept = [(n, r) for n, r in zip(names, results, strict=True) if isinstance(r, fx.Node)]
        output = self.gm.graph.output(tuple(result for _, result in kept))
        output.meta["val"] = tuple(G.value(result) for _, result in kept)
        self.gm.meta["output_names"] = tuple(name for name, _ in kept)

    def drop_unused(self) -> None:
        for node in reversed(list(self.gm.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.gm.graph.erase_node(node)
        G.remove_unused_constants(self.gm)


def output_names(program: ExportedProgram, count: int) -> list[str]:
    """`output` for one tensor; dict keys, field names and positions for nested results."""
    spec = program.call_spec.out_spec
    if spec is None or spec.num_leaves != count:
        return ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    names = ["_".join(_key(key) for key in path) for path, _ in paths]
    return [
        "output" if not name else f"output_{name}" if name[0].isdigit() else name for name in names
    ]


def _key(key: Any) -> str:
    for field in ("idx", "key", "name"):
        if hasattr(key, field):
            return str(getattr(key, field))
    return str(key)


def _check_interface(program: ExportedProgram) -> None:
    signature = program.graph_signature
    changed = {
        **signature.buffers_to_mutate,
        **getattr(signature, "user_inputs_to_mutate", {}),
        **getattr(signature, "parameters_to_mutate", {}),
    }
    if changed:
        raise ModelError(
            f"the model changes {', '.join(repr(name) for name in changed.values())} in forward; "
            "a compiled model keeps no state between calls",
            where=_origins(program, list(changed)),
            hint="pass the state in as an input and return its new value as an output",
        )
    kinds = (InputKind.CUSTOM_OBJ, InputKind.TOKEN)
    objects = [spec.arg.name for spec in signature.input_specs if spec.kind in kinds]
    if objects:
        raise ModelError(
            f"the model uses script objects ({', '.join(objects)}), which cannot be compiled",
            hint="replace them by plain tensors and functions",
        )
    results = program.graph_module.graph.output_node().args[0]
    odd = [
        spec.arg
        for spec, result in zip(signature.output_specs, results, strict=True)
        if spec.kind is OutputKind.USER_OUTPUT
        and not isinstance(result, fx.Node)
        and result is not None
    ]
    if odd:
        raise ModelError(
            f"the model returns Python values besides tensors: {', '.join(map(str, odd))}",
            hint="return tensors only",
        )


def _check_nodes(program: ExportedProgram) -> None:
    dropout = (aten.native_dropout.default, aten.dropout.default, aten.bernoulli.p)
    foreign, control, value_shaped, training = [], [], [], []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        result = node.meta.get("val")
        if any(not _is_static(leaf) for leaf in pytree.tree_leaves(result)):
            value_shaped.append(node)
        elif not isinstance(node.target, torch._ops.OpOverload):
            control += [] if _is_getitem(node) else [node]
        elif node.target.namespace not in G.NAMESPACES:
            foreign.append(node)
        elif node.target in dropout and node.args[-1] is True:
            training.append(node)
    if value_shaped:
        # What follows from them is no news.
        value_shaped = [n for n in value_shaped if not {*n.all_input_nodes} & {*value_shaped}]
        raise ModelError(
            f"the size or a number in {_named(value_shaped)} depends on the values of tensors; a "
            "compiled model has fixed shapes",
            where=_places(value_shaped),
            hint="avoid .item(), nonzero and boolean indexing; use torch.where or fixed sizes",
        )
    if control:
        raise UnsupportedError(
            f"the model holds {_named(control)}, which are not tensor operators",
            where=_places(control),
            hint="replace control-flow operators by torch.where",
        )
    if foreign:
        raise UnsupportedError(
            f"the model calls {_named(foreign)}, which only the library that brings it can compute",
            where=_places(foreign),
            hint="choose or write an implementation that is made of PyTorch's own operators",
        )
    if training:
        raise ModelError(
            "the model was exported in training mode: its dropout is active",
            where=_places(training),
            hint="call model.eval() before torch.export.export",
        )


def _is_getitem(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _is_static(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return all(isinstance(size, int) for size in value.shape)
    return not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")


def _named(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(dict.fromkeys(str(node.target) for node in nodes))


def _places(nodes: Sequence[fx.Node]) -> G.Origin:
    return tuple(dict.fromkeys(place for node in nodes for place in node_origin(node)))


def _origins(program: ExportedProgram, names: Sequence[str]) -> G.Origin:
    wanted = set(names)
    return _places([node for node in program.graph.nodes if node.name in wanted])
