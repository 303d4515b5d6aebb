"""Which constants are tables: a run reads few of their elements, at places only it knows."""

from __future__ import annotations

from math import prod

from torch import fx

from graphopt import graph as G
from graphopt.ops import OPS
from graphopt.ops.opdef import Kind

_LEAST_BYTES = 1 << 20
_LARGEST_SHARE = 1 / 8
"""Storage reads scattered pages at about a tenth of the pace of neighbouring ones."""


def is_table(node: fx.Node) -> bool:
    """Whether it is a large constant that operators only pick a small share of elements from.

    An output element of an injective operator is made from single elements of its operands.
    """
    if node.op != "get_attr" or G.value(node).nbytes < _LEAST_BYTES:
        return False
    if any(OPS[user.target].kind is not Kind.INJECTIVE for user in node.users):
        return False
    read = sum(prod(G.shape(user)) for user in node.users)
    return read <= _LARGEST_SHARE * prod(G.shape(node))
