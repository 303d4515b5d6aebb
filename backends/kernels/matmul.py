"""Products of computed matrices: batched `matmul` and scaled dot-product attention.

A task of `matmul` multiplies a band of rows by all columns, in the register tiles of `product.py`.
What a task of attention does is in `attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd, prod, sqrt
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.kernels import attention
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, each, f32, loop, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.product import Panels, choose_rows, emit_product, span, tile_row
from graphopt.backends.kernels.tiling import LINE, split
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Expr, broadcast_index

_BAND = 32
"""Rows of the left operand in one task."""
_PACKED_BAND = 128
"""The same where each task copies the right operand."""
_WAYS = 8
"""Lines of a first-level cache that share a set."""


def lower_matmul(request: Request) -> KernelSource | None:
    """`matmul` of two computed tensors, batch dimensions broadcast.

    A vector on the left is a matrix of one row, one on the right a matrix of one column; the
    result has no dimension for it.
    """
    call = request.call
    a, b = call.operands(OPS[request.anchor.target].operands)
    a_shape, b_shape = G.shape(a), G.shape(b)
    row_vector, column_vector = len(a_shape) == 1, len(b_shape) == 1
    m, depth = 1 if row_vector else a_shape[-2], a_shape[-1]
    n = 1 if column_vector else b_shape[-1]
    lead = call.shape[: len(call.shape) - (not row_vector) - (not column_vector)]
    isa = request.target.isa.widened()
    rows, (vectors,) = choose_rows(m, [(-(-n // isa.block), depth)], isa)
    panels = Panels(depth, n, isa.block, vectors)
    packs = m >= _BAND and _thrashes(panels, request.target.l1_bytes)
    bands = split(-(-m // rows), max(3, (_PACKED_BAND if packs else _BAND) // rows))

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        *batch, number = unflatten(task, [*lead, bands.count])
        a_batch = broadcast_index(tuple(batch), a_shape[:-2])
        b_batch = broadcast_index(tuple(batch), b_shape[:-2])
        first_tile, tiles = span(bands, number)
        packed: Any = (
            T.decl_buffer((panels.panel_size,), "float32", data=scratch) if packs else None
        )

        def left(t: Expr, r: int, k: Expr) -> Expr:
            i = tile_row(first_tile + t, rows, m) + r
            return group.read(a, (k,) if row_vector else (*a_batch, i, k))

        def read(panel: Expr, k: Expr, column: Expr) -> Expr:
            j = panel * panels.width + column
            return group.read(b, (k,) if column_vector else (*b_batch, k, j))

        def pack(panel: Expr, columns: int) -> None:
            def copy(k: Expr, column: Expr) -> None:
                place = panels.inside(0, k, column)
                T.buffer_store(packed, read(panel, k, column), [place])

            with loop(depth) as k:
                each(columns, isa.block, lambda column: copy(k, column))

        def store(t: Expr, r: int, first: Expr, count: int, value: Callable[[Expr], Expr]) -> None:
            i = tile_row(first_tile + t, rows, m) + r
            with loop(count, "vectorized") as lane:
                column = () if column_vector else (first + lane,)
                index = (*batch, *(() if row_vector else (i,)), *column)
                group.give(request.anchor, lambda _: value(lane))
                out.store(index, group.read(request.root, index))

        if packs:
            emit_product(panels, lambda _, k, column: packed[panels.inside(0, k, column)],
                         rows, tiles, left, store, padded=False, before=pack)  # fmt: skip
        else:
            emit_product(panels, read, rows, tiles, left, store, padded=False)

    flops = 2 * prod(lead) * m * n * depth
    scratch = panels.panel_size * 4 if packs else 0
    return KernelSource("matmul", prod(lead) * bands.count, flops, emit, request.reads,
                        scratch=scratch)  # fmt: skip


def _thrashes(panels: Panels, l1_bytes: int) -> bool:
    """Whether a panel cannot stay in the first-level cache as it lies: the starts of its rows fall
    into few of the cache's sets."""
    sets = l1_bytes // (_WAYS * LINE * 4)
    lines = -(-panels.width // LINE)
    apart = gcd(panels.columns // LINE, sets) if panels.columns % LINE == 0 else 1
    return panels.depth * lines > _WAYS * min(sets, sets // apart * lines)


def lower_attention(request: Request) -> KernelSource | None:
    """`scaled_dot_product_attention` with optional mask, causal or not, grouped heads or not.

    Permutes behind it are where the results are stored.
    """
    call = request.call
    q, k, v = (call[name] for name in ("query", "key", "value"))
    shape = call.shape
    lead = shape[:-2]
    queries, keys = G.shape(q)[-2], G.shape(k)[-2]
    depth, width = G.shape(q)[-1], G.shape(v)[-1]
    scale = call["scale"] if call["scale"] is not None else 1.0 / sqrt(depth)
    chosen = attention.plan(
        prod(lead), queries, keys, depth, width, float(scale), _adds(call), call["is_causal"],
        request.target.isa.widened(), request.target.l2_bytes,
    )  # fmt: skip
    order = _stored_order(request)
    repeat = 1
    if call.arguments.get("enable_gqa"):
        repeat = G.shape(q)[-3] // G.shape(k)[-3]

    def heads(batch: list[Expr], shape: tuple[int, ...]) -> tuple[Expr, ...]:
        index = list(batch)
        if repeat > 1:
            index[-1] = index[-1] // repeat
        return broadcast_index(tuple(index), shape[:-2])

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        *batch, part = unflatten(task, [*lead, chosen.parts.count])
        q_batch = broadcast_index(tuple(batch), G.shape(q)[:-2])
        k_batch, v_batch = heads(batch, G.shape(k)), heads(batch, G.shape(v))

        def mask(score: Expr, i: Expr, j: Expr) -> Expr:
            return _masked(call, group, score, (*batch, i, j))

        def store(i: Expr, column: Expr, value: Expr) -> None:
            index = (*batch, i, column)
            place = tuple(index[axis] for axis in order)
            group.give(request.anchor, lambda _: value)
            out.store(place, group.read(request.root, place))

        operands = attention.Operands(
            lambda i, d: group.read(q, (*q_batch, i, d)),
            lambda j, d: group.read(k, (*k_batch, j, d)),
            lambda j, column: group.read(v, (*v_batch, j, column)),
            mask if call["attn_mask"] is not None or call["is_causal"] else None,
            store,
        )
        attention.emit(chosen, part, operands, scratch)

    pairs = queries * keys
    if call["is_causal"]:
        pairs = sum(min(query + 1, keys) for query in range(queries))
    flops = 2 * prod(lead) * pairs * (depth + width)
    origin = f"attention {chosen.value_panels.width}×{chosen.rows}"
    return KernelSource(origin, prod(lead) * chosen.parts.count, flops, emit, request.reads,
                        scratch=chosen.places["end"] * 4)  # fmt: skip


def _stored_order(request: Request) -> list[int]:
    """The axis of the anchor's result that each axis of the stored one is."""
    node, order = request.anchor, list(range(len(request.call.shape)))
    while node is not request.root:
        (node,) = node.users
        if OPS[node.target].name == "permute":
            order = [order[axis] for axis in Call(node)["dims"]]
    return order


def _adds(call: Call) -> bool:
    """Whether there is a mask to be added."""
    mask = call["attn_mask"]
    return mask is not None and G.value(mask).dtype != torch.bool


def _masked(call: Call, group: Group, score: Expr, index: tuple[Expr, ...]) -> Expr:
    """The score with the mask, additive or boolean, and the causal triangle applied."""
    mask = call["attn_mask"]
    if mask is not None:
        value = group.read(mask, broadcast_index(index, G.shape(mask)))
        added = _adds(call)
        score = score + value if added else tirx.Select(value, score, f32(float("-inf")))
    if call["is_causal"]:
        score = tirx.Select(index[-1] <= index[-2], score, f32(float("-inf")))
    return score
