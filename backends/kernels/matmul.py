"""Products of computed matrices: batched `matmul` and scaled dot-product attention.

Both keep a register tile of the result, some rows by some vectors of columns, broadcast the left
operand and read the right one along its rows. Attention works on one head and a band of queries at
a time: the keys are transposed into scratch, then scores, softmax and the sum over the values run
on scores that never leave the cache (the blocking of Dao et al., "FlashAttention", 2022, without
its rescaling: a row of scores fits).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt import graph as G
from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels import attention
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, f32, loop, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.tiling import Split, choose_tile, split
from graphopt.ops import OPS
from graphopt.ops.opdef import Call, Expr, broadcast_index

_BAND = 32
"""Rows of the left operand in one task."""


def emit_product(
    rows: int,
    columns: int,
    depth: int,
    left: Callable[[Expr, Expr], Expr],
    right: Callable[[Expr, Expr], Expr],
    store: Callable[[Expr, Expr, Expr], None],
    isa: Isa,
) -> None:
    """Emit `store(i, j, Σ_k left(i, k) · right(k, j))` over `rows` by `columns`.

    `right` and `store` should be contiguous in `j`. All three take indices of any form.
    """
    block = isa.block
    blocks, ragged = divmod(columns, block)
    tile = choose_tile(max(1, blocks), rows, isa, block)
    cut = split(rows, tile.pixels)

    def columns_of(first: Expr, vectors: int, lanes: int) -> None:
        for size, start, count in _pieces(cut.size, cut.large, cut.count):
            with loop(count) as i:
                _product_tile(start + i * size, size, first, vectors, lanes, depth,
                              left, right, store)  # fmt: skip

    full, extra = divmod(blocks, tile.vectors)
    if full:
        with loop(full) as j:
            columns_of(j * (tile.vectors * block), tile.vectors, block)
    if extra:
        columns_of(tirx.const(full * tile.vectors * block, "int32"), extra, block)
    if ragged:
        columns_of(tirx.const(blocks * block, "int32"), 1, ragged)


def _pieces(size: int, large: int, count: int) -> list[tuple[int, int, int]]:
    """(piece size, first row, number of pieces) of an even split."""
    pieces = [(size, 0, large)]
    if count > large:
        pieces.append((size - 1, large * size, count - large))
    return pieces


def _product_tile(
    row: Expr, rows: int, column: Expr, vectors: int, lanes: int, depth: int,
    left: Callable[[Expr, Expr], Expr], right: Callable[[Expr, Expr], Expr],
    store: Callable[[Expr, Expr, Expr], None],
) -> None:  # fmt: skip
    acc = T.alloc_buffer((rows * vectors * lanes,), "float32", scope="local")
    for slot in range(rows * vectors):
        with loop(lanes, "vectorized") as lane:
            T.buffer_store(acc, f32(0.0), [slot * lanes + lane])
    with loop(depth) as k:
        for r in range(rows):
            x = left(row + r, k)
            for v in range(vectors):
                with loop(lanes, "vectorized") as lane:
                    slot = (r * vectors + v) * lanes + lane
                    y = right(k, column + v * lanes + lane)
                    T.buffer_store(acc, acc[slot] + x * y, [slot])
    for r in range(rows):
        for v in range(vectors):
            with loop(lanes, "vectorized") as lane:
                slot = (r * vectors + v) * lanes + lane
                store(row + r, column + v * lanes + lane, acc[slot])


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
    isa = request.target.isa
    bands = split(m, min(m, _BAND))

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        *batch, number = unflatten(task, [*lead, bands.count])
        a_batch = broadcast_index(tuple(batch), a_shape[:-2])
        b_batch = broadcast_index(tuple(batch), b_shape[:-2])

        def band(first: Expr, rows: int) -> None:
            def store(i: Expr, j: Expr, value: Expr) -> None:
                row, column = () if row_vector else (first + i,), () if column_vector else (j,)
                index = (*batch, *row, *column)
                group.give(request.anchor, lambda _: value)
                out.store(index, group.read(request.root, index))

            emit_product(
                rows, n, depth,
                lambda i, k: group.read(a, (k,) if row_vector else (*a_batch, first + i, k)),
                lambda k, j: group.read(b, (k,) if column_vector else (*b_batch, k, j)),
                store, isa,
            )  # fmt: skip

        _each_band(bands, number, band)

    flops = 2 * prod(lead) * m * n * depth
    return KernelSource("matmul", prod(lead) * bands.count, flops, emit, request.reads)


def _each_band(bands: Split, number: Expr, body: Callable[[Expr, int], None]) -> None:
    """Emit `body(first row, rows)` for the band of this number; bands have at most two sizes."""
    if bands.large == bands.count:
        body(number * bands.size, bands.size)
        return
    with T.If(number < bands.large):
        with T.Then():
            body(number * bands.size, bands.size)
        with T.Else():
            body(number * (bands.size - 1) + bands.large, bands.size - 1)


def lower_attention(request: Request) -> KernelSource | None:
    """`scaled_dot_product_attention` with optional mask, causal or not, grouped heads or not."""
    call = request.call
    q, k, v = (call[name] for name in ("query", "key", "value"))
    shape = call.shape
    lead = shape[:-2]
    queries, keys = G.shape(q)[-2], G.shape(k)[-2]
    depth, width = G.shape(q)[-1], G.shape(v)[-1]
    scale = call["scale"] if call["scale"] is not None else 1.0 / math.sqrt(depth)
    chosen = attention.plan(
        prod(lead), queries, keys, depth, width, float(scale), _adds(call),
        request.target.isa, request.target.l2_bytes,
    )  # fmt: skip
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
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        operands = attention.Operands(
            lambda i, d: group.read(q, (*q_batch, i, d)),
            lambda j, d: group.read(k, (*k_batch, j, d)),
            lambda j, column: group.read(v, (*v_batch, j, column)),
            mask if call["attn_mask"] is not None or call["is_causal"] else None,
            store,
        )
        attention.emit(chosen, part, operands, scratch)

    flops = 2 * prod(lead) * queries * keys * (depth + width)
    origin = f"attention {chosen.value_panels.width}×{chosen.rows}"
    return KernelSource(origin, prod(lead) * chosen.parts.count, flops, emit, request.reads,
                        scratch=chosen.places["end"] * 4)  # fmt: skip


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
