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
from graphopt.backends.kernels.base import KernelSource, Request
from graphopt.backends.kernels.builder import View, f32, loop, unflatten
from graphopt.backends.kernels.fusion import Group
from graphopt.backends.kernels.rows import fold
from graphopt.backends.kernels.tiling import Tile, choose_tile, split
from graphopt.ops import math as M
from graphopt.ops.opdef import Expr, broadcast_index

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
    """`matmul` of two computed tensors of at least two dimensions, batch dimensions broadcast."""
    call = request.call
    a, b = call["self"], call["other"] if "other" in call.arguments else call["mat2"]
    a_shape, b_shape = G.shape(a), G.shape(b)
    if len(a_shape) < 2 or len(b_shape) < 2:
        return None
    shape = call.shape
    lead = shape[:-2]
    m, n, depth = shape[-2], shape[-1], a_shape[-1]
    isa = request.target.isa
    # Bands of one size only, so that the code is emitted once: the largest divisor that fits.
    band = max(d for d in range(1, min(m, _BAND) + 1) if m % d == 0)
    bands = m // band

    def emit(
        task: Expr, views: dict[fx.Node, View], constants: list[Any], out: View, group: Group,
        scratch: Any,
    ) -> None:  # fmt: skip
        *batch, row = unflatten(task, [*lead, bands])
        a_batch = broadcast_index(tuple(batch), a_shape[:-2])
        b_batch = broadcast_index(tuple(batch), b_shape[:-2])

        def store(i: Expr, j: Expr, value: Expr) -> None:
            index = (*batch, row * band + i, j)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        emit_product(
            band, n, depth,
            lambda i, k: group.read(a, (*a_batch, row * band + i, k)),
            lambda k, j: group.read(b, (*b_batch, k, j)),
            store, isa,
        )  # fmt: skip

    flops = 2 * prod(shape) * depth
    return KernelSource("matmul", prod(lead) * bands, flops, emit, request.reads)


def lower_attention(request: Request) -> KernelSource | None:
    """`scaled_dot_product_attention` with optional mask, causal or not, grouped heads or not."""
    call = request.call
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    shape = call.shape
    lead = shape[:-2]
    queries, keys = G.shape(q)[-2], G.shape(k)[-2]
    depth, width = G.shape(q)[-1], G.shape(v)[-1]
    scale = call["scale"] if call["scale"] is not None else 1.0 / math.sqrt(depth)
    isa = request.target.isa
    block = isa.block
    band = max(d for d in range(1, min(queries, _BAND) + 1) if queries % d == 0)
    bands = queries // band
    row_length = -(-keys // block) * block
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
        *batch, row = unflatten(task, [*lead, bands])
        transposed = T.decl_buffer((depth, row_length), "float32", data=scratch)
        scores = T.decl_buffer((band, row_length), "float32", data=scratch,
                               elem_offset=depth * row_length)  # fmt: skip
        q_batch = broadcast_index(tuple(batch), G.shape(q)[:-2])
        k_batch, v_batch = heads(batch, G.shape(k)), heads(batch, G.shape(v))
        with loop(depth) as d, loop(keys) as j:
            T.buffer_store(transposed, group.read(k, (*k_batch, j, d)), [d, j])

        def score(i: Expr, j: Expr, value: Expr) -> None:
            value = value * f32(float(scale))
            at = row * band + i
            if mask is not None:
                bias = group.read(mask, broadcast_index((*batch, at, j), G.shape(mask)))
                if G.value(mask).dtype == torch.bool:
                    value = tirx.Select(bias, value, f32(float("-inf")))
                else:
                    value = value + bias
            if call["is_causal"]:
                value = tirx.Select(j <= at, value, f32(float("-inf")))
            T.buffer_store(scores, value, [i, j])

        emit_product(
            band, keys, depth,
            lambda i, d: group.read(q, (*q_batch, row * band + i, d)),
            lambda d, j: transposed[d, j],
            score, isa,
        )  # fmt: skip
        with loop(band) as i:
            top = fold(keys, block, "max", lambda j: scores[i, j])
            # A row with nothing to attend to gives zeros, as in PyTorch.
            base = T.alloc_buffer((1,), "float32", scope="local")
            empty = top[0] == f32(float("-inf"))
            T.buffer_store(base, tirx.Select(empty, f32(0.0), top[0]), [0])
            _each_store(keys, block, lambda j: T.buffer_store(
                scores, M.exp(scores[i, j] - base[0]), [i, j]))  # fmt: skip
            total = fold(keys, block, "sum", lambda j: scores[i, j])
            share = T.alloc_buffer((1,), "float32", scope="local")
            T.buffer_store(
                share, tirx.Select(total[0] == f32(0.0), f32(0.0), f32(1.0) / total[0]), [0]
            )
            _each_store(keys, block, lambda j: T.buffer_store(
                scores, scores[i, j] * share[0], [i, j]))  # fmt: skip

        def store(i: Expr, j: Expr, value: Expr) -> None:
            index = (*batch, row * band + i, j)
            group.give(request.anchor, lambda _: value)
            out.store(index, group.read(request.root, index))

        emit_product(
            band, width, keys,
            lambda i, j: scores[i, j],
            lambda j, d: group.read(v, (*v_batch, j, d)),
            store, isa,
        )  # fmt: skip

    flops = 2 * prod(lead) * queries * keys * (depth + width)
    scratch = (depth + band) * row_length * 4
    return KernelSource("attention", prod(lead) * bands, flops, emit, request.reads,
                        scratch=scratch)  # fmt: skip


def _each_store(count: int, lanes: int, body: Callable[[Expr], None]) -> None:
    full, rest = divmod(count, lanes)
    if full:
        with loop(full) as i, T.vectorized(0, lanes) as lane:
            body(i * lanes + lane)
    if rest:
        with loop(rest) as i:
            body(full * lanes + i)


__all__ = ["Tile", "lower_attention", "lower_matmul"]
