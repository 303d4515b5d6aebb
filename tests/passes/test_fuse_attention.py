"""fuse_attention: where scale, masks and transpositions may be, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, changes, ops, refusals, run
from torch import fx, nn

from graphopt import graph as g
from graphopt.importers import import_model
from graphopt.passes import Context, default_pipeline, run_passes
from graphopt.passes.fuse_attention import FuseAttention

add, mul, div = aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor
matmul, permute, softmax = aten.matmul.default, aten.permute.default, aten.softmax.int
where, reshape = aten.where.self, aten.reshape.default

FUSE = "fuse attention"
B, H, L, S, D, E = 2, 3, 5, 7, 4, 6
SWAP = [0, 1, 3, 2]
MINUS_INFINITY = float("-inf")


def qkv(b: Build) -> tuple[fx.Node, fx.Node, fx.Node]:
    return b.input(B, H, L, D), b.input(B, H, S, D), b.input(B, H, S, E)


def scored(b: Build, q: fx.Node, k: fx.Node) -> fx.Node:
    return b.call(matmul, q, b.call(permute, k, SWAP))


def shared_out(b: Build, scores: fx.Node, v: fx.Node) -> fx.Node:
    return b.call(matmul, b.call(softmax, scores, len(g.shape(scores)) - 1), v)


def attention_node(gm: fx.GraphModule) -> fx.Node:
    (node,) = (n for n in gm.graph.nodes if "scaled_dot_product" in str(n.target))
    return node


def fused(gm: fx.GraphModule, *samples: tuple[torch.Tensor, ...]) -> fx.Node:
    assert changes(run(gm, FuseAttention(), samples=samples)) == {FUSE: 1}
    assert not {"matmul", "softmax"} & set(ops(gm))
    return attention_node(gm)


PLACES = ("q", "k", "k transposed", "scores", "scores divided", "nowhere")


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(PLACES), max_size=3, unique=True), st.booleans())
def test_scale_anywhere(places: list[str], number_first: bool) -> None:
    b = Build()
    q, k, v = qkv(b)

    def times(x: fx.Node, factor: float) -> fx.Node:
        return b.call(mul, b.const(factor), x) if number_first else b.call(mul, x, factor)

    expected = 1.0
    if "q" in places:
        q, expected = times(q, 0.7), expected * 0.7
    if "k" in places:
        k, expected = times(k, 0.9), expected * 0.9
    k = b.call(permute, k, SWAP)
    if "k transposed" in places:
        k, expected = times(k, 0.8), expected * 0.8
    scores = b.call(matmul, q, k)
    if "scores" in places:
        scores, expected = times(scores, 0.5), expected * 0.5
    if "scores divided" in places:
        scores, expected = b.call(div, scores, 2.0), expected / 2
    node = fused(b.done(shared_out(b, scores, v)))
    assert math.isclose(node.kwargs["scale"], expected, rel_tol=1e-6)
    assert ops(b.gm) == ["scaled_dot_product_attention"]


def test_keys_transposed_with_the_heads() -> None:
    b = Build()
    x, k, v = b.input(B, L, H, D), b.input(B, S, H, D), b.input(B, S, H, E)
    q, v = (b.call(permute, t, [0, 2, 1, 3]) for t in (x, v))
    scores = b.call(matmul, q, b.call(permute, k, [0, 2, 3, 1]))
    node = fused(b.done(shared_out(b, scores, v)))
    keys = node.args[1]
    assert isinstance(keys, fx.Node)
    assert keys.args[1] == [0, 2, 1, 3]


def test_keys_that_come_transposed() -> None:
    b = Build()
    scores = b.call(matmul, b.input(B, H, L, D), b.input(B, H, D, S))
    fused(b.done(shared_out(b, scores, b.input(B, H, S, E))))
    assert ops(b.gm) == ["permute", "scaled_dot_product_attention"]


def test_keys_transposed_for_others_too() -> None:
    b = Build()
    q, k, v = qkv(b)
    flipped = b.call(permute, k, SWAP)
    out = shared_out(b, b.call(matmul, q, flipped), v)
    fused(b.done(out, b.call(aten.exp.default, flipped)))


def test_a_scaled_query_read_elsewhere_keeps_its_scale() -> None:
    b = Build()
    q, k, v = qkv(b)
    q = b.call(mul, q, 0.5)
    node = fused(b.done(shared_out(b, scored(b, q, k), v), q))
    assert node.kwargs["scale"] == 1.0
    assert node.args[0] is q


def test_queries_that_are_the_keys() -> None:
    b = Build()
    x = b.call(mul, b.input(B, H, L, D), 0.5)
    fused(b.done(shared_out(b, scored(b, x, x), x)))


@pytest.mark.parametrize("batch", [(), (3,), (2, 2, 3)])
def test_any_rank(batch: tuple[int, ...]) -> None:
    b = Build()
    swap = [*range(len(batch)), len(batch) + 1, len(batch)]
    q, k, v = b.input(*batch, L, D), b.input(*batch, S, D), b.input(*batch, S, E)
    scores = b.call(matmul, q, b.call(permute, k, swap))
    fused(b.done(shared_out(b, scores, v)))


def test_transposed_as_convolutional_models_write_it() -> None:
    b = Build()
    q, k, v = b.input(B, H, D, L), b.input(B, H, D, L), b.input(B, H, E, L)
    scores = b.call(mul, b.call(matmul, b.call(permute, q, SWAP), k), 0.5)
    shares = b.call(permute, b.call(softmax, scores, 3), SWAP)
    fused(b.done(b.call(matmul, v, shares)))
    assert ops(b.gm)[-2:] == ["scaled_dot_product_attention", "permute"]


MASKS = [(L, S), (S,), (), (1, S), (L, 1), (B, 1, 1, S), (1, H, L, S), (B, H, L, S)]


@pytest.mark.parametrize("sizes", MASKS)
def test_added_masks(sizes: tuple[int, ...]) -> None:
    b = Build()
    q, k, v = qkv(b)
    mask = b.input(*sizes)
    scores = b.call(add, b.call(div, scored(b, q, k), 2.0), mask)
    node = fused(b.done(shared_out(b, scores, v)))
    assert node.kwargs["scale"] == 0.5


def test_masks_under_the_scale_and_several_of_them() -> None:
    b = Build()
    q, k, v = qkv(b)
    scores = b.call(add, b.input(1, H, L, S), scored(b, q, k))
    scores = b.call(mul, scores, 0.5)
    scores = b.call(add, scores, b.const(torch.linspace(0, 1, S)))
    fused(b.done(shared_out(b, scores, v)))
    assert ops(b.gm) == ["mul", "add", "scaled_dot_product_attention"]


def test_scores_of_positions_count_as_a_mask() -> None:
    b = Build()
    q, k, v = qkv(b)
    places = b.call(matmul, q, b.input(D, S))
    gm = b.done(shared_out(b, b.call(add, scored(b, q, k), places), v))
    assert changes(run(gm, FuseAttention())) == {FUSE: 1}
    assert ops(gm) == ["matmul", "scaled_dot_product_attention"]


def _attended(b: Build) -> tuple[fx.Node, torch.Tensor]:
    """A mask of bools in which every row has something to attend to."""
    random = torch.Generator().manual_seed(1)
    attended = torch.rand((B, 1, L, S), generator=random) > 0.5
    attended[..., 0] = True
    return b.input(B, 1, L, S, dtype=torch.bool), attended


@pytest.mark.parametrize("fill", [MINUS_INFINITY, -1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("inverted", [False, True])
def test_selected_masks(fill: float, inverted: bool) -> None:
    b = Build()
    q, k, v = qkv(b)
    condition, attended = _attended(b)
    scores = b.call(mul, scored(b, q, k), 0.5)
    number = b.const(torch.tensor(fill))
    sides = (number, scores) if inverted else (scores, number)
    gm = b.done(shared_out(b, b.call(where, condition, *sides), v))
    random = torch.Generator().manual_seed(2)
    values = tuple(torch.randn(g.shape(n), generator=random) for n in (q, k, v))
    node = fused(gm, (*values, ~attended if inverted else attended))
    mask = node.args[3]
    assert isinstance(mask, fx.Node)
    assert g.value(mask).dtype == (torch.bool if fill == MINUS_INFINITY else torch.float32)


def test_rows_without_anything_to_attend_to_are_equal_shares() -> None:
    b = Build()
    q, k, v = qkv(b)
    condition = b.input(L, S, dtype=torch.bool)
    scores = b.call(where, condition, scored(b, q, k), b.const(-3e38))
    gm = b.done(shared_out(b, scores, v))
    random = torch.Generator().manual_seed(2)
    values = tuple(torch.randn(g.shape(n), generator=random) for n in (q, k, v))
    fused(gm, (*values, torch.zeros(L, S, dtype=torch.bool)))


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_guarded_against_nan(transposed: bool) -> None:
    b = Build()
    q, k, v = b.input(B, H, L, D), b.input(B, H, L, D), b.input(B, H, L, L)
    mask = b.input(L, L)
    shares = b.call(softmax, b.call(add, scored(b, q, k), mask), 3)
    shares = b.call(where, b.call(aten.isnan.default, shares), b.const(0.0), shares)
    product = (v, b.call(permute, shares, SWAP)) if transposed else (shares, v)
    gm = b.done(b.call(matmul, *product))
    random = torch.Generator().manual_seed(2)
    values = tuple(torch.randn(g.shape(n), generator=random) for n in (q, k, v))
    closed = torch.full((L, L), MINUS_INFINITY).triu(2)
    closed[0] = MINUS_INFINITY
    fused(gm, (*values, closed))


def test_selected_and_added_masks() -> None:
    b = Build()
    q, k, v = qkv(b)
    condition, attended = _attended(b)
    scores = b.call(add, scored(b, q, k), b.const(torch.linspace(0, 1, S)))
    scores = b.call(where, condition, scores, b.const(MINUS_INFINITY))
    gm = b.done(shared_out(b, scores, v))
    random = torch.Generator().manual_seed(2)
    values = tuple(torch.randn(g.shape(n), generator=random) for n in (q, k, v))
    fused(gm, (*values, attended))


Refused = Callable[[Build], tuple[fx.Node, ...]]


def _other_axis(b: Build) -> tuple[fx.Node, ...]:
    q, k = b.input(B, H, L, D), b.input(B, H, L, D)
    shares = b.call(softmax, scored(b, q, k), 2)
    return (b.call(matmul, shares, b.input(B, H, L, E)),)


def _shares_returned(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = qkv(b)
    shares = b.call(softmax, scored(b, q, k), 3)
    return b.call(matmul, shares, v), shares


def _scores_returned(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = qkv(b)
    scores = scored(b, q, k)
    return shared_out(b, b.call(mul, scores, 0.5), v), b.call(aten.exp.default, scores)


def _batches(b: Build) -> tuple[fx.Node, ...]:
    scores = scored(b, b.input(B, H, L, D), b.input(1, 1, S, D))
    return (shared_out(b, scores, b.input(B, H, S, E)),)


def _double(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = (b.input(B, H, n, D, dtype=torch.float64) for n in (L, S, S))
    return (shared_out(b, scored(b, q, k), v),)


def _wide_mask(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = b.input(1, H, L, D), b.input(1, H, S, D), b.input(1, H, S, E)
    return (shared_out(b, b.call(add, scored(b, q, k), b.input(B, 1, L, S)), v),)


def _integer_mask(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = qkv(b)
    return (shared_out(b, b.call(add, scored(b, q, k), b.input(L, S, dtype=torch.int64)), v),)


def _weak_mask(b: Build) -> tuple[fx.Node, ...]:
    q, k, v = qkv(b)
    condition = b.input(L, S, dtype=torch.bool)
    return (shared_out(b, b.call(where, condition, scored(b, q, k), b.const(-1e4)), v),)


REFUSED: dict[str, tuple[Refused, str]] = {
    "other axis": (_other_axis, "the softmax runs over dimension 2 of 4, not the last"),
    "shares returned": (
        _shares_returned,
        "its intermediate value softmax_int is also read by output",
    ),
    "scores returned": (
        _scores_returned,
        "its intermediate value matmul_default is also read by exp_default",
    ),
    "batches": (
        _batches,
        "q, k and v have different batch dimensions: [[2, 3], [1, 1], [2, 3]]",
    ),
    "double": (_double, "it computes in torch.float64, not in float32"),
    "wide mask": (
        _wide_mask,
        "the mask of shape [2, 1, 5, 7] is wider than the scores [1, 3, 5, 7]",
    ),
    "integer mask": (_integer_mask, "the mask is torch.int64, not torch.float32"),
    "weak mask": (_weak_mask, "masked scores are set to -10000, which does not act as −∞"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    build, reason = REFUSED[name]
    b = Build()
    gm = b.done(*build(b))
    assert refusals(run(gm, FuseAttention())) == {FUSE: reason}


def test_other_products_stay() -> None:
    b = Build()
    pooled = b.call(matmul, b.call(softmax, b.input(B, H, L, S), 3), b.input(B, H, S, E))
    q, k, v = qkv(b)
    capped = b.call(aten.tanh.default, scored(b, q, k))
    gm = b.done(pooled, shared_out(b, capped, v))
    result = run(gm, FuseAttention())
    assert not result.changed
    assert not result.notes


class Written(nn.Module):
    """Multi-head self-attention as models write it in Python, with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)

    def forward(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        mixed = self.mix(x).reshape(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        q, k, v = mixed.unbind(0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // 4)
        scores = scores + (1.0 - attended[:, None, None, :].float()) * -10000.0
        out = torch.softmax(scores, -1) @ v
        return self.out(out.transpose(1, 2).reshape(batch, length, width))


def test_from_pytorch_through_the_pipeline() -> None:
    torch.manual_seed(0)
    model = Written().eval()
    inputs = (torch.randn(2, 5, 12), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    gm = import_model(model, inputs)
    run_passes(gm, default_pipeline(), Context(verify=2, samples=(inputs,)))
    assert ops(gm).count("scaled_dot_product_attention") == 1
    assert "softmax" not in ops(gm)
    torch.testing.assert_close(gm(*inputs)[0], model(*inputs), rtol=1e-5, atol=1e-6)
