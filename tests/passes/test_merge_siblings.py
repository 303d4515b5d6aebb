"""merge_siblings: layers of one input become one, where that pays; what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pass_graphs import Build, aten, changes, evaluate, inputs_for, ops, refusals, run
from test_fold_batch_norm import conv, draw
from torch import fx, nn

from graphopt import graph as g
from graphopt.importers import import_model
from graphopt.passes import Context, default_pipeline, resolve, run_passes
from graphopt.passes.merge_siblings import MergeSiblings

WHAT = "merge siblings"
linear, relu, cat = aten.linear.default, aten.relu.default, aten.cat.default


def source(b: Build, *sizes: int) -> fx.Node:
    return b.call(aten.sin.default, b.input(*sizes))


def heads(b: Build, x: fx.Node, count: int) -> fx.Node:
    """(batch, length, width) to (batch, count, length, width / count)."""
    batch, length, width = g.shape(x)
    apart = b.call(aten.reshape.default, x, [batch, length, count, width // count])
    return b.call(aten.permute.default, apart, [0, 2, 1, 3])


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_queries_keys_and_values(biases: tuple[bool, ...]) -> None:
    b = Build()
    x = source(b, 2, 9, 12)
    sides = []
    for width, has_bias in zip((12, 12, 24), biases, strict=True):
        bias = b.const(draw(width)) if has_bias else None
        sides.append(heads(b, b.call(linear, x, b.const(draw(width, 12)), bias), 2))
    gm = b.done(b.call(aten.scaled_dot_product_attention.default, *sides))
    assert changes(run(gm, MergeSiblings())) == {WHAT: 1}
    assert ops(gm).count("linear") == 1
    (merged,) = (n for n in gm.graph.nodes if n.target is linear)
    assert (merged.args[2] is not None) == any(biases)
    assert len(merged.meta["origin"]) == 3


def test_equal_heads_are_cut_behind_the_reshape() -> None:
    b = Build()
    x = source(b, 2, 9, 12)
    sides = [heads(b, b.call(linear, x, b.const(draw(12, 12)), None), 2) for _ in range(3)]
    gm = b.done(b.call(aten.scaled_dot_product_attention.default, *sides))
    run(gm, MergeSiblings())
    permutes = [n for n in gm.graph.nodes if n.target is aten.permute.default]
    # Slice and permute next to each other are one copy.
    assert all(n.args[0].target is aten.slice.Tensor for n in permutes)
    assert len(permutes) == 3


def test_only_what_goes_to_attention_is_merged() -> None:
    b = Build()
    x = source(b, 2, 9, 12)
    sides = [heads(b, b.call(linear, x, b.const(draw(12, 12)), None), 2) for _ in range(3)]
    gate = b.call(relu, b.call(linear, x, b.const(draw(12, 12)), None))
    gm = b.done(b.call(aten.scaled_dot_product_attention.default, *sides), gate)
    assert changes(run(gm, MergeSiblings())) == {WHAT: 1}
    assert ops(gm).count("linear") == 2


def _two_convolutions(b: Build, **geometry: Any) -> tuple[fx.Node, fx.Node]:
    x = source(b, 2, 3, 9, 9)
    kernel = geometry.pop("kernel", 3)
    first = conv(b, x, b.const(draw(8, 3, kernel, kernel)), bias=False, **geometry)
    second = conv(b, x, b.const(draw(6, 3, kernel, kernel)), **geometry)
    return first, second


@pytest.mark.parametrize("geometry", [{"kernel": 1}, {"padding": 1}, {"stride": 2}])
def test_convolutions_that_are_joined(geometry: dict[str, Any]) -> None:
    b = Build()
    gm = b.done(b.call(cat, list(_two_convolutions(b, **geometry)), 1))
    assert changes(run(gm, MergeSiblings())) == {WHAT: 1}
    assert ops(gm) == ["sin", "convolution"]


def test_joined_in_another_order_and_among_others() -> None:
    b = Build()
    first, second = _two_convolutions(b)
    other = b.call(relu, b.input(2, 5, 7, 7))
    gm = b.done(b.call(cat, [other, second, first, other], 1))
    assert changes(run(gm, MergeSiblings())) == {WHAT: 1}
    assert ops(gm) == ["sin", "convolution", "relu", "cat"]


def test_linears_that_are_joined() -> None:
    b = Build()
    x = source(b, 9, 12)
    parts = [b.call(linear, x, b.const(draw(width, 12)), None) for width in (16, 16)]
    gm = b.done(b.call(cat, parts, 1))
    assert changes(run(gm, MergeSiblings())) == {WHAT: 1}
    assert ops(gm) == ["sin", "linear"]


def test_copies_where_they_are_asked_for() -> None:
    b = Build()
    gm = b.done(*(b.call(relu, part) for part in _two_convolutions(b)))
    assert changes(run(gm, MergeSiblings(copies=True))) == {WHAT: 1}
    assert ops(gm) == ["sin", "convolution", "slice", "slice", "relu", "relu"]


def test_results_of_the_model_may_be_merged() -> None:
    b = Build()
    gm = b.done(*_two_convolutions(b))
    assert changes(run(gm, MergeSiblings(copies=True))) == {WHAT: 1}


Refused = Callable[[Build], tuple[fx.Node, ...]]


def _copied(b: Build) -> tuple[fx.Node, ...]:
    return tuple(b.call(relu, part) for part in _two_convolutions(b))


def _joined_apart(b: Build) -> tuple[fx.Node, ...]:
    first, second = _two_convolutions(b)
    return (b.call(cat, [first, b.input(2, 5, 7, 7), second], 1),)


def _joined_along_another_dimension(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 2, 3, 8, 8)
    parts = [conv(b, x, b.const(draw(4, 3, 1, 1))) for _ in range(2)]
    return (b.call(cat, parts, 2),)


def _joined_twice(b: Build) -> tuple[fx.Node, ...]:
    first, second = _two_convolutions(b)
    return (b.call(cat, [first, second, first], 1),)


def _fire(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 1, 3, 8, 8)
    narrow, wide = (b.const(draw(4, 3, size, size)) for size in (1, 3))
    return (b.call(cat, [conv(b, x, narrow), conv(b, x, wide, padding=1)], 1),)


def _small(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 1, 3, 2, 2)
    return (b.call(cat, [conv(b, x, b.const(draw(4, 3, 1, 1))) for _ in range(2)], 1),)


def _grouped(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 1, 4, 8, 8)
    return (b.call(cat, [conv(b, x, b.const(draw(4, 2, 1, 1)), groups=2) for _ in range(2)], 1),)


def _transposed(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 1, 4, 8, 8)
    parts = [conv(b, x, b.const(draw(4, 2, 1, 1)), transposed=True) for _ in range(2)]
    return (b.call(cat, parts, 1),)


def _computed(b: Build) -> tuple[fx.Node, ...]:
    x = source(b, 9, 12)
    weight = b.input(16, 12)
    return (b.call(cat, [b.call(linear, x, weight, None) for _ in range(2)], 1),)


REFUSED: dict[str, tuple[Refused, str]] = {
    "copied": (
        _copied,
        "the parts of the merged result would be copied for "
        "convolution_default, convolution_default_1",
    ),
    "joined apart": (
        _joined_apart,
        "the parts of the merged result would be copied for "
        "convolution_default, convolution_default_1",
    ),
    "joined along another dimension": (
        _joined_along_another_dimension,
        "the parts of the merged result would be copied for "
        "convolution_default, convolution_default_1",
    ),
    "joined twice": (
        _joined_twice,
        "the parts of the merged result would be copied for "
        "convolution_default, convolution_default_1",
    ),
    "fire": (
        _fire,
        "layers that read one tensor differ in kernel size, stride, padding, dilation, "
        "dtype or kind",
    ),
    "small": (_small, "the merged result would have 32 elements only"),
    "grouped": (_grouped, "a convolution with groups reads another part of the tensor in each"),
    "transposed": (_transposed, "a transposed convolution"),
    "computed": (_computed, "the weight of linear_default_1 is not constant"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    build, reason = REFUSED[name]
    b = Build()
    result = run(b.done(*build(b)), MergeSiblings())
    assert not result.changed
    assert reason in [note.reason for note in result.notes]


def test_large_shared_weights_are_refused() -> None:
    b = Build()
    x, weight = source(b, 9, 12), b.const(draw(16, 12))
    parts = [b.call(linear, x, weight, b.const(draw(16))) for _ in range(2)]
    gm = b.done(b.call(cat, parts, 1))
    reason = refusals(run(gm, MergeSiblings(copy_limit=100)))[WHAT]
    assert "is shared with" in reason


def test_single_layers_say_nothing() -> None:
    b = Build()
    gm = b.done(conv(b, source(b, 1, 3, 8, 8), b.const(draw(4, 3, 1, 1))))
    assert not run(gm, MergeSiblings()).notes


def test_it_is_asked_for_by_name() -> None:
    assert MergeSiblings.name not in [each.name for each in default_pipeline()]
    assert resolve(["merge_siblings"]) == [MergeSiblings()]


def test_a_pytorch_attention_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                layer(x).view(2, 10, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v)
            )
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    torch.manual_seed(0)
    model = Block().eval()
    x = torch.randn(2, 10, 16)
    gm = import_model(model, (x,))
    run_passes(gm, [*default_pipeline(), MergeSiblings()], Context(verify=2))
    assert ops(gm).count("linear") == 1
    (out,) = evaluate(gm, inputs_for(gm))
    with torch.no_grad():
        expected = model(*inputs_for(gm))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
