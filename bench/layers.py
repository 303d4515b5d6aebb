"""Single layers for benchmarks: written as short texts, found in models, built as graphs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.ops import OPS
from graphopt.ops.opdef import Call
from tests.backends.harness import Builder

aten = torch.ops.aten
Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """One layer, batch 1. As a text: `conv 64x56x56 128 k3 s2 p1`, `linear 128x384 1536`.

    Attributes:
        op: `conv`, `linear`, `matmul` or `attention`.
        shape: conv: channels, rows, columns of the input; linear: rows, columns; matmul: batch,
            rows, depth, columns; attention: heads, queries, depth, keys, width of the values.
        out: channels or columns of the result, where the shape does not say.
        kernel, stride, padding, dilation, groups: of a convolution.
    """

    op: str
    shape: tuple[int, ...]
    out: int = 0
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        """The text that `parse` reads."""
        parts = [self.op, "x".join(map(str, self.shape))]
        if self.out:
            parts.append(str(self.out))
        if self.op == "conv":
            parts.append(f"k{_short(self.kernel)}")
            for letter, value, usual in (
                ("s", self.stride, (1, 1)),
                ("p", self.padding, (0, 0)),
                ("d", self.dilation, (1, 1)),
            ):
                if value != usual:
                    parts.append(f"{letter}{_short(value)}")
            if self.groups != 1:
                parts.append(f"g{self.groups}")
        return " ".join(parts)

    @property
    def conv_spec(self) -> ConvSpec | None:
        """As the convolution that its kernel computes, where it is one."""
        if self.op == "linear":
            rows, columns = self.shape
            return ConvSpec(1, 1, columns, self.out, (1, rows), (1, rows), (1, 1))
        if self.op != "conv":
            return None
        channels, *size = self.shape
        spatial = zip(size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        rows, columns = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in spatial)
        groups = self.groups
        spec = ConvSpec(1, groups, channels // groups, self.out // groups, (size[0], size[1]),
                        (rows, columns), self.kernel, self.stride, self.padding,
                        self.dilation)  # fmt: skip
        if self.kernel == (1, 1) == self.stride and self.padding == (0, 0):
            row = (1, rows * columns)
            return ConvSpec(1, groups, spec.icg, spec.ocg, row, row, (1, 1))
        return spec


def _short(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}x{pair[1]}"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("x"))


def _pair(text: str) -> Pair:
    numbers = _numbers(text)
    return numbers[0], numbers[-1]


def parse(text: str) -> Layer:
    """The layer that a text like `conv 64x56x56 128 k3 s2 p1` says."""
    op, shape, *rest = text.split()
    out = int(rest.pop(0)) if rest and rest[0].isdigit() else 0
    options = {word[0]: word[1:] for word in rest}
    return Layer(
        op,
        _numbers(shape),
        out,
        kernel=_pair(options.get("k", "1")),
        stride=_pair(options.get("s", "1")),
        padding=_pair(options.get("p", "0")),
        dilation=_pair(options.get("d", "1")),
        groups=int(options.get("g", "1")),
    )


def layers_of(gm: fx.GraphModule) -> Iterator[Layer | None]:
    """The layers with kernels of their own, in order; None for one that has no text."""
    for node in gm.graph.nodes:
        if node.op == "call_function":
            name = OPS[node.target].name
            if name == "convolution":
                yield _convolution(Call(node))
            elif name in ("linear", "matmul"):
                yield _product(gm, node, name)
            elif name == "attention":
                yield _attention(Call(node))


def _convolution(call: Call) -> Layer | None:
    size, weight = call.shape_of("input"), call.shape_of("weight")
    if len(size) != 4 or size[0] != 1 or call["transposed"]:
        return None
    stride, padding, dilation = (
        (int(call[name][0]), int(call[name][-1])) for name in ("stride", "padding", "dilation")
    )
    kernel = (weight[2], weight[3])
    return Layer(
        "conv", size[1:], weight[0], kernel, stride, padding, dilation, int(call["groups"])
    )


def _product(gm: fx.GraphModule, node: fx.Node, name: str) -> Layer | None:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    a, b = G.shape(left), G.shape(right)
    if name == "linear" or (len(b) == 2 and G.constant(gm, right) is not None):
        return Layer("linear", (prod(a[:-1]), a[-1]), b[0] if name == "linear" else b[1])
    if len(a) < 2 or a[:-2] != b[:-2]:
        return None
    return Layer("matmul", (prod(a[:-2]), a[-2], a[-1], b[-1]))


def _attention(call: Call) -> Layer | None:
    q, k, v = (call.shape_of(name) for name in ("query", "key", "value"))
    if q[:-2] != k[:-2]:
        return None
    return Layer("attention", (prod(q[:-2]), q[-2], q[-1], k[-2], v[-1]))


def build(layer: Layer) -> tuple[fx.GraphModule, str]:
    """A graph in which the layer stands as in a network, and the name of its operator.

    What it reads was written just before, a convolution's input in blocks of channels if another
    convolution can have made it; a bias and ReLU are fused into it where a network has them.
    """
    b = Builder()
    if layer.op == "conv":
        b.returns(_built_convolution(b, layer))
        return b.finish(), "convolution"
    if layer.op == "linear":
        rows, columns = layer.shape
        x = _fresh(b, 1, rows, columns)
        weight = b.constant(b.random(layer.out, columns) / columns**0.5)
        y = b.op(aten.linear.default, x, weight, b.constant(b.random(layer.out)))
        b.returns(b.op(aten.relu.default, y))
        return b.finish(), "linear"
    if layer.op == "matmul":
        batch, rows, depth, columns = layer.shape
        left, right = _fresh(b, batch, rows, depth), _fresh(b, batch, depth, columns)
        b.returns(b.op(aten.matmul.default, left, right))
        return b.finish(), "matmul"
    heads, queries, depth, keys, width = layer.shape
    q, k, v = (
        # As networks make them: heads beside one another, split and permuted without a copy.
        b.op(aten.permute.default, _fresh(b, 1, rows, heads, columns), [0, 2, 1, 3])
        for rows, columns in ((queries, depth), (keys, depth), (keys, width))
    )
    b.returns(b.op(aten.scaled_dot_product_attention.default, q, k, v))
    return b.finish(), "attention"


def _fresh(b: Builder, *shape: int) -> fx.Node:
    """A tensor that a step before has just written."""
    return b.op(aten.relu.default, b.input(b.random(*shape)))


def _built_convolution(b: Builder, layer: Layer) -> fx.Node:
    channels, *size = layer.shape
    if channels <= 4:
        x = _fresh(b, 1, *layer.shape)
    else:
        x = b.conv(b.input(b.random(1, 8, *size)), channels, (1, 1))
    y = b.conv(
        x, layer.out, layer.kernel, stride=list(layer.stride), padding=list(layer.padding),
        dilation=list(layer.dilation), groups=layer.groups,
    )  # fmt: skip
    # A convolution behind it takes its blocks; a result of the graph would be row-major.
    return b.conv(b.op(aten.relu.default, y), 8, (1, 1))
