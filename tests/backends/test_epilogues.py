"""What is fused behind kernels: random graphs with many axes of length 1, broadcasts and views."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from torch import fx

from graphopt import graph as G
from tests.backends.harness import Builder, aten, check

_GRAPHS = 10
"""Of a seed, in one program: building one takes longer than running it."""


def _lead(rng: random.Random, most: int = 4) -> list[int]:
    return [rng.choice([1, 1, 2, 3, 17]) for _ in range(rng.randint(0, most))]


def _linear(b: Builder, rng: random.Random) -> fx.Node:
    depth, out = rng.choice([1, 4, 12, 33]), rng.choice([1, 3, 8, 16, 40])
    bias = b.constant(b.random(out)) if rng.random() < 0.5 else None
    x = b.input(b.random(*_lead(rng), depth))
    return b.op(aten.linear.default, x, b.constant(b.random(out, depth)), bias)


def _matmul(b: Builder, rng: random.Random) -> fx.Node:
    lead, depth = _lead(rng, 2), rng.choice([1, 4, 12])
    left = b.input(b.random(*lead, rng.choice([1, 3, 17]), depth))
    kept = [size if rng.random() < 0.6 else 1 for size in lead]
    return b.op(aten.matmul.default, left, b.input(b.random(*kept, depth, rng.choice([1, 3, 16]))))


def _softmax(b: Builder, rng: random.Random) -> fx.Node:
    sizes = [*_lead(rng, 3), rng.choice([1, 5, 17])]
    return b.op(aten.softmax.int, b.input(b.random(*sizes)), rng.randrange(len(sizes)))


def _layer_norm(b: Builder, rng: random.Random) -> fx.Node:
    width = rng.choice([1, 4, 12, 33])
    parameters = [b.constant(b.random(width)) for _ in range(2)]
    x = b.input(b.random(*_lead(rng), width))
    return b.op(aten.layer_norm.default, x, [width], *parameters, 1e-5, True)


def _mean(b: Builder, rng: random.Random) -> fx.Node:
    sizes = [*_lead(rng, 3), rng.choice([1, 5, 17])]
    keep = rng.random() < 0.5
    return b.op(aten.mean.dim, b.input(b.random(*sizes)), [rng.randrange(len(sizes))], keep)


def _convolution(b: Builder, rng: random.Random) -> fx.Node:
    channels, out = rng.choice([1, 3, 8, 16]), rng.choice([1, 5, 8, 16, 24])
    sizes = rng.choice([(1, 1), (1, 7), (7, 1), (5, 6), (9,), (1,)])
    kernel = tuple(rng.choice([1, 1, 3]) for _ in sizes)
    groups = channels if rng.random() < 0.25 else 1
    return b.conv(
        b.input(b.random(rng.choice([1, 2]), channels, *sizes)), channels if groups > 1 else out,
        kernel, padding=[size // 2 for size in kernel], stride=rng.choice([1, 1, 2]), groups=groups,
    )  # fmt: skip


def _attention(b: Builder, rng: random.Random) -> fx.Node:
    batch, heads, queries = rng.choice([1, 2]), rng.choice([1, 3]), rng.choice([1, 7, 17])
    keys, width = rng.choice([1, 5, 16]), rng.choice([4, 16])
    q = b.input(b.random(batch, heads, queries, width))
    k, v = (b.input(b.random(batch, heads, keys, width)) for _ in range(2))
    kept = [rng.choice([1, size]) for size in (batch, heads, queries)]
    mask = b.input(b.random(*kept, keys)) if rng.random() < 0.5 else None
    return b.op(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False)


_KERNELS: list[Callable[[Builder, random.Random], fx.Node]] = [
    _linear, _linear, _matmul, _softmax, _layer_norm, _mean, _convolution, _attention,
]  # fmt: skip


def _epilogue(b: Builder, rng: random.Random, y: fx.Node) -> fx.Node:
    """Up to three ops: operands of the same shape or broadcast, functions, views."""
    for _ in range(rng.randint(0, 3)):
        sizes = list(G.shape(y))
        kind = rng.choice(["binary", "binary", "function", "permute", "reshape"])
        if kind == "binary":
            if rng.random() < 0.5:
                sizes = [size if rng.random() < 0.6 else 1 for size in sizes]
            values = b.random(*sizes[rng.choice([0, 0, 0, 1]) :])
            other = b.input(values) if rng.random() < 0.7 else b.constant(values)
            y = b.op(rng.choice([aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor]), y, other)
        elif kind == "function":
            y = b.op(rng.choice([aten.relu.default, aten.gelu.default, aten.tanh.default]), y)
        elif kind == "permute":
            y = b.op(aten.permute.default, y, rng.sample(range(len(sizes)), len(sizes)))
        else:
            without = [size for size in sizes if size != 1] or [1]
            y = b.op(aten.reshape.default, y, rng.choice([[1, *sizes], without]))
    return y


@pytest.mark.parametrize("seed", [0, 1, 2, 38, 52])
def test_random_graphs(seed: int) -> None:
    """The last two have residuals of linear layers whose rows end with an axis of length 1."""
    b, rng = Builder(seed), random.Random(seed)
    for _ in range(_GRAPHS):
        b.returns(_epilogue(b, rng, rng.choice(_KERNELS)(b, rng)))
    check(b, tolerance=1e-4)
