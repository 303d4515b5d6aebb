"""The whole pipeline on small models of every kind: the same values, and nothing left to do."""

from __future__ import annotations

import time
from copy import deepcopy

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, evaluate, inputs_for, ops
from test_fold_batch_norm import conv, draw, norm
from torch import fx

from graphopt import graph as g
from graphopt.passes import Context, default_pipeline, run_passes


def check(gm: fx.GraphModule, tolerance: float = 2e-5) -> None:
    """Values move by rounding only, the given copy stays whole, and a second run does nothing."""
    before = deepcopy(gm)
    run_passes(gm, default_pipeline(), Context(verify=2))
    inputs = inputs_for(before)
    pairs = zip(evaluate(before, inputs), evaluate(gm, inputs), strict=True)
    for old, new in pairs:
        largest = float(old.abs().max())
        assert float((new - old).abs().max()) <= tolerance * max(1.0, largest)
    again = run_passes(gm, default_pipeline(), Context(verify=2))
    assert not [record.name for record in again if record.changed]
    # The compiled module runs, too.
    assert len(gm(*inputs)) == len(g.outputs(gm))


LAYERS = ("conv", "grouped", "transposed", "norm", "scale", "shift", "relu", "hardswish", "gelu")
MOVES = ("pad", "permute", "split", "pool", "residual", "flip")


@st.composite
def recipes(draw_from: st.DrawFn) -> list[str]:
    return draw_from(st.lists(st.sampled_from(LAYERS + MOVES), min_size=1, max_size=9))


def cook(b: Build, x: fx.Node, recipe: list[str]) -> fx.Node:
    start = x
    for step in recipe:
        channels = g.shape(x)[1]
        if step == "conv":
            x = conv(b, x, b.const(draw(4, channels, 3, 3) / 6), padding=1)
        elif step == "grouped":
            x = conv(b, x, b.const(draw(channels, channels // 2, 1, 1)), groups=2)
        elif step == "transposed":
            x = conv(b, x, b.const(draw(channels, 2, 2, 2) / 2), transposed=True, groups=2)
        elif step == "norm":
            x = norm(b, x)
        elif step == "scale":
            x = b.call(aten.mul.Scalar, x, 0.7)
        elif step == "shift":
            x = b.call(aten.sub.Tensor, x, b.const(draw(channels, 1, 1)), alpha=2)
        elif step == "relu":
            x = b.call(aten.clamp_max.default, b.call(aten.relu.default, x), 6.0)
        elif step == "hardswish":
            six = b.call(aten.relu6.default, b.call(aten.add.Scalar, x, 3.0))
            x = b.call(aten.div.Scalar, b.call(aten.mul.Tensor, x, six), 6.0)
        elif step == "gelu":
            erf = b.call(aten.erf.default, b.call(aten.mul.Tensor, x, b.const(0.5**0.5)))
            x = b.call(
                aten.mul.Tensor, b.call(aten.mul.Tensor, x, 0.5), b.call(aten.add.Tensor, erf, 1)
            )
        elif step == "pad":
            x = b.call(aten.pad.default, x, [1, 1, 1, 1])
        elif step == "permute":
            x = b.call(aten.transpose.int, b.call(aten.transpose.int, x, 2, 3), -1, -2)
        elif step == "split":
            halves = b.call(aten.chunk.default, x, 2, 1)
            x = b.call(aten.cat.default, [b.item(halves, 1), b.item(halves, 0)], 1)
        elif step == "pool":
            x = b.call(aten.max_pool2d.default, x, [2], [1])
        elif step == "residual":
            x = b.call(aten.add.Tensor, x, x)
        elif step == "flip":
            x = b.call(aten.flip.default, x, [3])  # an op canonicalize does not know
    return b.call(aten.add.Tensor, x, 1.0) if x is start else x


@settings(max_examples=25, deadline=None)
@example(["pad", "norm", "grouped"], 1)
@example(["scale", "pad", "scale", "pad", "conv"], 1)
@given(recipes(), st.integers(1, 2))
def test_random_models(recipe: list[str], batch: int) -> None:
    b = Build()
    check(b.done(cook(b, b.input(batch, 4, 12, 11), recipe)))


def test_a_small_transformer_block() -> None:
    b = Build()
    tokens = b.input(2, 7, dtype=torch.int64)
    table = b.const(draw(5, 8))
    x = b.call(aten.embedding.default, table, tokens)
    normal = b.call(
        aten.native_layer_norm.default, x, [8], b.const(draw(8)), b.const(draw(8)), 1e-5
    )
    flat = b.call(aten.view.default, b.item(normal, 0), [14, 8])
    weight = b.call(aten.t.default, b.const(draw(24, 8)))
    mixed = b.call(aten.addmm.default, b.const(draw(24)), flat, weight)
    parts = b.call(aten.split.Tensor, b.call(aten.view.default, mixed, [2, 7, 24]), 8, 2)
    heads = [
        b.call(
            aten.transpose.int,
            b.call(aten.view.default, b.item(parts, i), [2, 7, 2, 4]),
            1,
            2,
        )
        for i in range(3)
    ]
    out = b.call(aten.scaled_dot_product_attention.default, *heads)
    joined = b.call(
        aten.view.default,
        b.call(aten.contiguous.default, b.call(aten.transpose.int, out, 1, 2)),
        [2, 7, 8],
    )
    x = b.call(aten.add.Tensor, x, joined)
    logits = b.call(aten.matmul.default, x, b.call(aten.t.default, table))
    gm = b.done(logits, b.call(aten.select.int, x, 1, 0))
    check(gm)
    assert "getitem" not in ops(gm)
    # The embedding table and the output layer still share one tensor.
    assert sum(tuple(t.shape) == (5, 8) for t in gm.buffers()) == 1


def test_an_identity_model() -> None:
    b = Build()
    x = b.input(2, 3)
    gm = b.done(b.call(aten.dropout.default, b.call(aten.clone.default, x), 0.5, False), x)
    run_passes(gm, default_pipeline())
    assert ops(gm) == []


def test_an_all_constant_model() -> None:
    b = Build()
    b.input(2)
    gm = b.done(b.call(aten.add.Tensor, b.const(torch.ones(2)), 1.0))
    run_passes(gm, default_pipeline(), Context(verify=2))
    assert ops(gm) == []


@pytest.mark.parametrize("blocks", [300])
def test_large_graphs_do_not_take_long(blocks: int) -> None:
    b = Build()
    x = b.input(1, 2, 4, 4)
    for _ in range(blocks):
        x = norm(b, conv(b, x, b.const(draw(2, 2, 1, 1))))
        x = b.call(aten.relu.default, x)
        x = b.call(aten.transpose.int, b.call(aten.transpose.int, x, 1, 2), 1, 2)
        x = b.call(aten.div.Scalar, b.call(aten.mul.Scalar, x, 2.0), 2.0)
    gm = b.done(x)
    start = time.perf_counter()
    records = run_passes(gm, default_pipeline())
    # Several times what it takes on a slow machine; something quadratic would take minutes.
    assert time.perf_counter() - start < 60
    assert max(record.seconds for record in records) < 20
    assert len(ops(gm)) == 2 * blocks
