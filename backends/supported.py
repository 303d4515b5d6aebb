"""Tells which parts of a graph graphopt has no kernel for, all of them at once."""

from __future__ import annotations

import operator

import torch
from torch import fx

from graphopt import graph as G
from graphopt.errors import UnsupportedError
from graphopt.ops import OPS
from graphopt.ops.opdef import Call
from graphopt.ops.scalar import TIR_NAMES
from graphopt.program.partition import tensor_operands


def check_supported(gm: fx.GraphModule) -> None:
    """Raise one error that lists everything graphopt has no kernel for.

    Raises:
        UnsupportedError: with the reason and the origin of each operator call and each tensor
            without elements.
    """
    nodes = [node for node in gm.graph.nodes if node.op != "output"]
    calls = [found for node in nodes if (found := _problem(node))]
    empty = [found for node in nodes if (found := _emptiness(node))]
    if calls:
        raise UnsupportedError(
            f"the model uses {len(calls)} operator call(s) graphopt cannot compile",
            where=[*calls, *empty],
            hint="rewrite these parts of the model, or ask for the operators; "
            "CONTRIBUTING.md shows how one is added.",
        )
    if empty:
        raise UnsupportedError(
            f"the model makes {len(empty)} tensor(s) without elements, which are not compiled",
            where=empty,
            hint="give example inputs whose every dimension is at least 1, and remove slices and "
            "concatenations of nothing from the model.",
        )


def _problem(node: fx.Node) -> str | None:
    """Why this node cannot be compiled, and where it comes from."""
    if node.op != "call_function":
        # A constant is its reader's affair.
        strange = node.op == "placeholder" and _strange_dtype(node)
        return f"input {node.name}: {strange}" if strange else None
    if node.target is operator.getitem:
        # One of several results, which no operator of graphopt has: its call is named.
        return None
    op = OPS.get(node.target)
    if op is None:
        return f"{_op_name(node)}: no such operator in graphopt ({_place(node)})"
    constants = [operand for operand in tensor_operands(node) if operand.op == "get_attr"]
    strange = next(filter(None, map(_strange_dtype, (node, *constants))), None)
    reason = strange or (op.check(Call(node)) if op.check else None)
    return f"{op.name}: {reason} ({_place(node)})" if reason else None


def _strange_dtype(node: fx.Node) -> str | None:
    dtype = G.value(node).dtype
    return None if dtype in TIR_NAMES else f"dtype {dtype} is not supported"


def _emptiness(node: fx.Node) -> str | None:
    """The node's tensor, if it is the first in its line to have no elements."""
    if not _has_no_elements(node) or any(map(_has_no_elements, node.all_input_nodes)):
        return None
    what = {"placeholder": "input", "get_attr": "constant"}.get(node.op, "result of")
    name = _op_name(node) if node.op == "call_function" else node.name
    return f"{what} {name} has shape {G.shape(node)} ({_place(node)})"


def _has_no_elements(node: fx.Node) -> bool:
    # Calls that give several tensors are not compiled, and reported for that.
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.numel() == 0


def _place(node: fx.Node) -> str:
    return "; ".join(G.origin(node)) or node.name


def _op_name(node: fx.Node) -> str:
    return str(getattr(node.target, "name", lambda: node.target)())
