"""simplify: what does nothing or is undone goes, to the last bit; what only seems so stays."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, inputs_for, ops, refusals, run
from torch import fx

from graphopt.passes.simplify import Simplify

SPECIAL = torch.tensor([-0.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e-40, -3.5, 3e38])


def x8(b: Build) -> fx.Node:
    return b.input(8)


def image(b: Build) -> fx.Node:
    return b.input(2, 4, 6, 5)


def permute(b: Build, x: fx.Node, *order: int) -> fx.Node:
    return b.call(aten.permute.default, x, list(order))


def cut(b: Build, x: fx.Node, dim: int, start: int, end: int, step: int = 1) -> fx.Node:
    return b.call(aten.slice.Tensor, x, dim, start, end, step)


def pad(b: Build, x: fx.Node, amounts: list[int], value: float = 0.0) -> fx.Node:
    return b.call(aten.constant_pad_nd.default, x, amounts, value)


def cast(b: Build, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    return b.call(aten._to_copy.default, x, dtype=dtype)


def reshape(b: Build, x: fx.Node, *sizes: int) -> fx.Node:
    return b.call(aten.reshape.default, x, list(sizes))


def permuted_cat(b: Build, size: int) -> fx.Node:
    """Five rows that were permuted, behind so many that were not, permuted back together."""
    part = b.call(aten.permute.default, b.input(5, 3, 2), [2, 0, 1])
    whole = b.call(aten.cat.default, [b.input(2, size, 3), part], 1)
    return b.call(aten.permute.default, whole, [1, 2, 0])


def cat_pieces(b: Build, *bounds: int) -> fx.Node:
    x = image(b)
    pieces = [cut(b, x, 1, start, end) for start, end in itertools.pairwise(bounds)]
    return b.call(aten.cat.default, pieces, 1)


CASES: dict[str, tuple[Callable[[Build], fx.Node], list[str]]] = {
    "permutes cancel": (lambda b: permute(b, permute(b, image(b), 0, 2, 3, 1), 0, 3, 1, 2), []),
    "permutes merge": (
        lambda b: permute(b, permute(b, image(b), 0, 2, 3, 1), 3, 0, 1, 2),
        ["permute"],
    ),
    "transposed keys, as ONNX writes them": (
        lambda b: permute(
            b,
            reshape(b, permute(b, reshape(b, b.input(1, 3, 7, 5), 3, 7, 5), 0, 2, 1), 1, 3, 5, 7),
            0,
            1,
            3,
            2,
        ),
        [],
    ),
    "one of queries, keys and values": (
        lambda b: reshape(
            b, cut(b, permute(b, b.input(1, 7, 3, 2, 5), 2, 0, 3, 1, 4), 0, 1, 2), 1, 2, 7, 5
        ),
        ["reshape", "slice", "permute"],
    ),
    "heads of queries out of one product": (
        lambda b: permute(
            b, reshape(b, cut(b, b.input(2, 7, 24), 2, 8, 16), 2, 7, 2, 4), 0, 2, 1, 3
        ),
        ["reshape", "slice", "permute"],
    ),
    "a slice that heads go across": (
        lambda b: permute(b, reshape(b, cut(b, b.input(3, 5, 4), 1, 1, 3), 2, 3, 4), 1, 0, 2),
        ["slice", "reshape", "permute"],
    ),
    "ones between moved dimensions": (
        lambda b: reshape(b, permute(b, b.input(1, 4, 1, 6), 3, 0, 1, 2), 1, 6, 1, 1, 4),
        ["reshape", "permute"],
    ),
    "permute of ones": (lambda b: permute(b, b.input(2, 1, 5), 1, 0, 2), ["reshape"]),
    "reshapes merge": (lambda b: reshape(b, reshape(b, x8(b), 2, 4), 4, 2), ["reshape"]),
    "reshapes cancel": (lambda b: reshape(b, reshape(b, x8(b), 2, 4), 8), []),
    "expand to itself": (lambda b: b.call(aten.expand.default, x8(b), [8]), []),
    "slice of all": (lambda b: cut(b, x8(b), 0, 0, 8), []),
    "slices merge": (lambda b: cut(b, cut(b, x8(b), 0, 1, 8, 2), 0, 1, 3), ["slice"]),
    "slices of two dimensions": (
        lambda b: cut(b, cut(b, image(b), 1, 1, 3), 2, 1, 3),
        ["slice", "slice"],
    ),
    "pad by nothing": (lambda b: pad(b, x8(b), [0, 0]), []),
    "pad that shifts": (lambda b: pad(b, x8(b), [1, -1]), ["constant_pad_nd"]),
    "pads merge": (lambda b: pad(b, pad(b, image(b), [1, 2]), [0, 1, 3, 0]), ["constant_pad_nd"]),
    "pads of two values": (
        lambda b: pad(b, pad(b, x8(b), [1, 2], 0.0), [0, 1], -0.0),
        ["constant_pad_nd", "constant_pad_nd"],
    ),
    "cast to itself": (lambda b: cast(b, x8(b), torch.float32), []),
    "casts that lose nothing": (
        lambda b: cast(b, cast(b, x8(b), torch.float64), torch.float32),
        [],
    ),
    "casts that round": (
        lambda b: cast(b, cast(b, x8(b), torch.float16), torch.float32),
        ["_to_copy", "_to_copy"],
    ),
    "cast merges": (
        lambda b: cast(b, cast(b, b.input(3, dtype=torch.int8), torch.int32), torch.float32),
        ["_to_copy"],
    ),
    "cat of one": (lambda b: b.call(aten.cat.default, [x8(b)], 0), []),
    "cat of the pieces": (lambda b: cat_pieces(b, 0, 1, 3, 4), []),
    "cat of some pieces": (lambda b: cat_pieces(b, 0, 1, 3), ["slice", "slice", "cat"]),
    "permute before cat": (
        lambda b: permuted_cat(b, 1),
        ["permute", "cat"],
    ),
    "permute of a cat of which little is permuted": (
        lambda b: permuted_cat(b, 9),
        ["permute", "cat", "permute"],
    ),
    "cats merge": (
        lambda b: b.call(aten.cat.default, [b.call(aten.cat.default, [x8(b), x8(b)], 0), x8(b)], 0),
        ["cat"],
    ),
    "pool of one pixel": (lambda b: b.call(aten.max_pool2d.default, image(b), [1, 1], [1, 1]), []),
    "pool with stride": (
        lambda b: b.call(aten.max_pool2d.default, image(b), [1, 1], [2, 2]),
        ["max_pool2d"],
    ),
    "upsample to itself": (
        lambda b: b.call(aten.upsample_nearest2d.vec, image(b), [6, 5], None),
        [],
    ),
    "upsample by a bit": (
        lambda b: b.call(aten.upsample_nearest2d.vec, image(b), None, [1.01, 1.01]),
        ["upsample_nearest2d"],
    ),
    "amax of a scalar": (
        lambda b: b.call(aten.amax.default, b.call(aten.relu.default, b.input()), [0], False),
        ["relu"],
    ),
    "amax of one": (
        lambda b: b.call(aten.amax.default, b.input(3, 1, 2), [1], False),
        ["reshape"],
    ),
    "mul by 1": (lambda b: b.call(aten.mul.Tensor, x8(b), 1.0), []),
    "div by 1": (lambda b: b.call(aten.div.Tensor, x8(b), 1), []),
    "mul by ones": (lambda b: b.call(aten.mul.Tensor, x8(b), b.const(torch.ones(8))), []),
    "mul by ones that broadcast": (
        lambda b: b.call(aten.mul.Tensor, x8(b), b.const(torch.ones(2, 8))),
        ["mul"],
    ),
    "mul by 0": (lambda b: b.call(aten.mul.Tensor, x8(b), 0.0), ["mul"]),
    "mul of integers by 1.0": (
        lambda b: b.call(aten.mul.Tensor, b.input(3, dtype=torch.int32), 1.0),
        ["mul"],
    ),
    "add -0.0": (lambda b: b.call(aten.add.Tensor, x8(b), -0.0), []),
    "sub 0.0": (lambda b: b.call(aten.sub.Tensor, x8(b), 0.0), []),
    "add 0 to integers": (
        lambda b: b.call(aten.add.Tensor, b.input(3, dtype=torch.int32), 0),
        [],
    ),
    "constant first": (
        lambda b: b.call(aten.add.Tensor, b.const(SPECIAL), x8(b)),
        ["add"],
    ),
    "max with a constant": (
        lambda b: b.call(aten.maximum.default, b.const(0.5), x8(b)),
        ["clamp"],
    ),
    "max with NaN": (
        lambda b: b.call(aten.maximum.default, x8(b), b.const(float("nan"))),
        ["maximum"],
    ),
    "one-element constant": (
        lambda b: b.call(aten.div.Tensor, x8(b), b.const(torch.tensor([3.1]))),
        ["div"],
    ),
    "compare": (lambda b: b.call(aten.gt.Tensor, x8(b), b.const(0.5)), ["gt"]),
    "pow 2": (lambda b: b.call(aten.pow.Tensor_Scalar, x8(b), 2), ["mul"]),
    "pow 0.5": (lambda b: b.call(aten.pow.Tensor_Scalar, x8(b), 0.5), ["sqrt"]),
    "pow 3": (lambda b: b.call(aten.pow.Tensor_Scalar, x8(b), 3), ["pow"]),
    "1 / x": (lambda b: b.call(aten.div.Tensor, b.const(1.0), x8(b)), ["reciprocal"]),
    "relu twice": (
        lambda b: b.call(aten.relu.default, b.call(aten.relu.default, x8(b))),
        ["relu"],
    ),
    "neg twice": (lambda b: b.call(aten.neg.default, b.call(aten.neg.default, x8(b))), []),
    "add of neg": (
        lambda b: b.call(aten.add.Tensor, x8(b), b.call(aten.neg.default, x8(b))),
        ["sub"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forms(name: str) -> None:
    build, expected = CASES[name]
    b = Build()
    gm = b.done(build(b))
    inputs = inputs_for(gm)
    special = tuple(SPECIAL if t.shape == (8,) else t for t in inputs)
    run(gm, Simplify(), samples=[inputs, special])
    assert ops(gm) == expected


def test_constants_of_one_element_become_numbers() -> None:
    b = Build()
    gm = b.done(b.call(aten.mul.Tensor, b.const(torch.tensor([0.1])), x8(b)))
    run(gm, Simplify())
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    assert node.args[1] == torch.tensor(0.1).item()


@pytest.mark.parametrize(("op", "zero"), [(aten.add.Tensor, 0.0), (aten.sub.Tensor, -0.0)])
def test_a_zero_that_changes_signs_is_refused(op: torch._ops.OpOverload, zero: float) -> None:
    b = Build()
    gm = b.done(b.call(op, x8(b), zero))
    assert refusals(run(gm, Simplify())) == {"drop add or sub of 0": "it turns -0.0 into 0.0"}
    assert len(ops(gm)) == 1


def test_long_chains_collapse() -> None:
    b = Build()
    x = image(b)
    for _ in range(300):
        x = permute(b, reshape(b, permute(b, x, 0, 2, 3, 1), 2, 6, 5, 4), 0, 3, 1, 2)
    gm = b.done(x)
    run(gm, Simplify())
    assert ops(gm) == []


@st.composite
def movements(draw: st.DrawFn) -> list[tuple[str, list[int]]]:
    return draw(
        st.lists(
            st.one_of(
                st.tuples(st.just("permute"), st.permutations([0, 1, 2])),
                st.tuples(st.just("slice"), st.lists(st.integers(0, 4), min_size=4, max_size=4)),
                st.tuples(st.just("pad"), st.lists(st.integers(0, 2), min_size=4, max_size=4)),
                st.tuples(st.just("reshape"), st.permutations([0, 1, 2])),
            ),
            max_size=8,
        )
    )


@settings(max_examples=60, deadline=None)
@given(movements())
def test_any_chain_of_movements_keeps_its_values(moves: list[tuple[str, list[int]]]) -> None:
    b = Build()
    x = b.input(3, 5, 4)
    for kind, numbers in moves:
        sizes = list(x.meta["val"].shape)
        if kind == "permute":
            x = permute(b, x, *numbers)
        elif kind == "reshape":
            x = reshape(b, x, *[sizes[i] for i in numbers])
        elif kind == "pad":
            x = pad(b, x, numbers)
        else:
            dim = numbers[0] % 3
            start = min(numbers[1], sizes[dim] - 1)
            end = min(start + 1 + numbers[2], sizes[dim])
            x = cut(b, x, dim, start, end, 1 + numbers[3] % 2)
    run(b.done(x), Simplify())
