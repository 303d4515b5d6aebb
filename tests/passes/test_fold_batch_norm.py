"""fold_batch_norm: into the layer before or after, refused where that is wrong, never left over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pass_graphs import Build, aten, changes, evaluate, inputs_for, ops, refusals, run
from torch import fx

from graphopt import graph as g
from graphopt.passes.fold_batch_norm import FoldBatchNorm

BEFORE = "fold batch_norm into the layer before"
AFTER = "fold batch_norm into the layer after"
SPLIT = "split batch_norm into mul and add"


def draw(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes) + len(sizes)))


def norm(b: Build, x: fx.Node, *, shift: bool = True, affine: bool = True) -> fx.Node:
    channels = g.shape(x)[1]
    random = torch.Generator().manual_seed(channels)
    weight, bias, mean = (torch.randn(channels, generator=random) for _ in range(3))
    var = torch.rand(channels, generator=random) + 0.5
    if not shift:
        bias, mean = torch.zeros(channels), torch.zeros(channels)
    parameters = [b.const(weight), b.const(bias)] if affine else [None, None]
    rest = (b.const(mean), b.const(var), False, 0.1, 1e-5, False)
    return b.call(aten.batch_norm.default, x, *parameters, *rest)


def conv(
    b: Build,
    x: fx.Node,
    weight: fx.Node,
    *,
    bias: bool = True,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
    groups: int = 1,
) -> fx.Node:
    sizes = g.shape(weight)
    dims = len(sizes) - 2
    added = b.const(draw(sizes[1] * groups if transposed else sizes[0])) if bias else None
    lists = [[stride] * dims, [padding] * dims, [dilation] * dims]
    return b.call(
        aten.convolution.default,
        x,
        weight,
        added,
        *lists,
        transposed,
        [output_padding] * dims,
        groups,
    )


@st.composite
def convolutions(draw_from: st.DrawFn) -> dict[str, object]:
    groups = draw_from(st.sampled_from([1, 1, 2, 3]))
    transposed = draw_from(st.booleans())
    stride = draw_from(st.integers(1, 3))
    return {
        "dims": draw_from(st.integers(1, 3)),
        "batch": draw_from(st.integers(1, 3)),
        "groups": groups,
        "inputs": groups * draw_from(st.integers(1, 3)),
        "outputs": groups * draw_from(st.integers(1, 3)),
        "kernel": draw_from(st.integers(1, 3)),
        "stride": stride,
        "padding": draw_from(st.integers(0, 1)),
        "dilation": draw_from(st.integers(1, 2)),
        "transposed": transposed,
        "output_padding": draw_from(st.integers(0, stride - 1)) if transposed else 0,
        "size": draw_from(st.sampled_from([5, 7, 8])),
        "bias": draw_from(st.booleans()),
    }


def build_conv(b: Build, x: fx.Node, spec: dict[str, object]) -> fx.Node:
    s = {key: int(value) for key, value in spec.items()}  # type: ignore[call-overload]
    kernel = [s["kernel"]] * s["dims"]
    pair = (s["inputs"], s["outputs"] // s["groups"])
    if not s["transposed"]:
        pair = (s["outputs"], s["inputs"] // s["groups"])
    names = ("stride", "padding", "dilation", "output_padding", "groups")
    return conv(
        b,
        x,
        b.const(draw(*pair, *kernel)),
        bias=bool(s["bias"]),
        transposed=bool(s["transposed"]),
        **{name: s[name] for name in names},
    )


def build_input(b: Build, spec: dict[str, object]) -> fx.Node:
    s = {key: int(value) for key, value in spec.items()}  # type: ignore[call-overload]
    return b.input(s["batch"], s["inputs"], *[s["size"]] * s["dims"])


def valid(spec: dict[str, object]) -> bool:
    try:
        b = Build()
        build_conv(b, build_input(b, spec), spec)
    except RuntimeError:
        return False
    return True


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.booleans())
def test_after_any_convolution_it_folds(spec: dict[str, object], affine: bool) -> None:
    assume(valid(spec))
    b = Build()
    gm = b.done(norm(b, build_conv(b, build_input(b, spec), spec), affine=affine))
    result = run(gm, FoldBatchNorm())
    assert changes(result) == {BEFORE: 1}
    assert ops(gm) == ["convolution"]


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.booleans())
def test_before_any_convolution_values_stay(spec: dict[str, object], shift: bool) -> None:
    assume(valid(spec))
    b = Build()
    gm = b.done(build_conv(b, norm(b, build_input(b, spec), shift=shift), spec))
    result = run(gm, FoldBatchNorm())
    assert "batch_norm" not in ops(gm)
    if not shift or not (spec["padding"] or spec["transposed"]):
        assert changes(result) == {AFTER: 1}


def test_linear_before_and_after() -> None:
    b = Build()
    x = norm(b, b.input(3, 5))
    y = b.call(aten.linear.default, x, b.const(draw(4, 5)), b.const(draw(4)))
    z = b.call(aten.linear.default, b.call(aten.relu.default, y), b.const(draw(3, 4)), None)
    gm = b.done(norm(b, z))
    assert changes(run(gm, FoldBatchNorm())) == {BEFORE: 1, AFTER: 1}
    assert ops(gm) == ["linear", "relu", "linear"]


def test_it_goes_into_the_layer_before_if_both_would_do() -> None:
    b = Build()
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    gm = b.done(conv(b, norm(b, x), b.const(draw(2, 3, 1))))
    assert changes(run(gm, FoldBatchNorm())) == {BEFORE: 1}


def test_origins_merge_and_weights_keep_their_name() -> None:
    b = Build()
    gm = b.done(norm(b, conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))))
    run(gm, FoldBatchNorm())
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    assert g.origin(node) == ("op3", "op8")


def test_alone_it_becomes_mul_and_add() -> None:
    b = Build()
    gm = b.done(norm(b, b.call(aten.relu.default, b.input(2, 3, 4, 5))))
    assert changes(run(gm, FoldBatchNorm())) == {SPLIT: 1}
    assert ops(gm) == ["relu", "mul", "add"]
    assert {tuple(t.shape) for t in gm.buffers() if t.ndim == 3} == {(3, 1, 1)}


def test_statistics_from_inputs_become_nodes() -> None:
    b = Build()
    x = conv(b, b.input(2, 3, 5), b.const(draw(4, 3, 3)))
    mean, var = b.input(4), b.input(4)
    rest = (False, 0.1, 1.0, False)
    gm = b.done(b.call(aten.batch_norm.default, x, b.const(draw(4)), None, mean, var, *rest))
    positive = tuple(t.abs() for t in inputs_for(gm))
    result = run(gm, FoldBatchNorm(), samples=[positive])
    assert refusals(result) == {BEFORE: "its statistics are not constant"}
    assert changes(result) == {SPLIT: 1}
    assert "batch_norm" not in ops(gm)


def refused(result: object) -> dict[str, str]:
    """Refusals of the folds; the split afterwards removes the node they were about."""
    return refusals(result)  # type: ignore[arg-type]


def test_shared_results_are_refused() -> None:
    b = Build()
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    gm = b.done(norm(b, x), b.call(aten.relu.default, x))
    result = run(gm, FoldBatchNorm())
    assert refused(result) == {
        BEFORE: "the result of convolution_default is also read by relu_default"
    }
    assert ops(gm) == ["convolution", "mul", "add", "relu"]


def test_a_result_that_is_an_output_is_refused() -> None:
    b = Build()
    x = conv(b, b.input(1, 2, 5), b.const(draw(3, 2, 3)))
    gm = b.done(norm(b, x), x)
    reason = refused(run(gm, FoldBatchNorm()))[BEFORE]
    assert reason == "the result of convolution_default is also read by output"


def test_padding_refuses_a_shift() -> None:
    b = Build()
    gm = b.done(conv(b, norm(b, b.input(1, 2, 5)), b.const(draw(3, 2, 3)), padding=1))
    result = run(gm, FoldBatchNorm())
    assert refused(result)[AFTER] == (
        "convolution_default pads with zeros, which the shift would not reach"
    )
    assert ops(gm) == ["mul", "add", "convolution"]


def test_padding_allows_a_scale() -> None:
    b = Build()
    x = norm(b, b.input(1, 2, 5), shift=False)
    gm = b.done(conv(b, x, b.const(draw(3, 2, 3)), padding=1, bias=False))
    assert changes(run(gm, FoldBatchNorm())) == {AFTER: 1}
    (node,) = (n for n in gm.graph.nodes if n.op == "call_function")
    assert node.args[2] is None


def test_transposed_convolution_refuses_a_shift() -> None:
    b = Build()
    x = norm(b, b.input(1, 2, 5))
    gm = b.done(conv(b, x, b.const(draw(2, 3, 3)), transposed=True, stride=2))
    assert refused(run(gm, FoldBatchNorm()))[AFTER] == (
        "convolution_default is a transposed convolution: the shift would differ between pixels"
    )


def test_computed_weights_are_refused() -> None:
    b = Build()
    gm = b.done(norm(b, conv(b, b.input(1, 2, 5), b.input(3, 2, 3))))
    assert refused(run(gm, FoldBatchNorm())) == {
        BEFORE: "the weight of convolution_default is not constant"
    }
    b = Build()
    x = b.call(aten.linear.default, b.input(2, 3), b.const(draw(4, 3)), b.input(4))
    gm = b.done(norm(b, x))
    assert refused(run(gm, FoldBatchNorm())) == {
        BEFORE: "the bias of linear_default is not constant"
    }


def test_small_shared_weights_fold_in_a_copy_large_ones_are_refused() -> None:
    def build() -> fx.GraphModule:
        b = Build()
        weight = b.const(draw(2, 2, 3))
        x = conv(b, b.input(1, 2, 9), weight)
        return b.done(norm(b, x), conv(b, x.args[0], weight))  # type: ignore[arg-type]

    gm = build()
    assert changes(run(gm, FoldBatchNorm())) == {BEFORE: 1}
    gm = build()
    assert refused(run(gm, FoldBatchNorm(copy_limit=10))) == {
        BEFORE: "the weight of convolution_default is shared with convolution_default_1, "
        "and a copy would take 48 bytes"
    }


def test_other_channel_dimensions_are_refused() -> None:
    b = Build()
    x = b.call(aten.linear.default, b.input(2, 3, 5), b.const(draw(4, 5)), None)
    gm = b.done(norm(b, x))
    assert refused(run(gm, FoldBatchNorm())) == {
        BEFORE: "it normalizes dimension 1 of 3, a linear layer gives the last"
    }
    b = Build()
    gm = b.done(b.call(aten.linear.default, norm(b, b.input(2, 3, 5)), b.const(draw(4, 5)), None))
    assert refused(run(gm, FoldBatchNorm()))[AFTER] == (
        "it normalizes dimension 1 of 3, a linear layer reads the last"
    )


def test_weights_that_overflow_are_refused() -> None:
    b = Build()
    x = conv(b, b.input(1, 1, 3), b.const(torch.full((1, 1, 1), 1e30)), bias=False)
    zero, huge = b.const(torch.zeros(1)), b.const(torch.full((1,), 1e30))
    one = b.const(torch.ones(1))
    rest = (zero, one, False, 0.1, 0.0, False)
    gm = b.done(b.call(aten.batch_norm.default, x, huge, None, *rest))
    small = (torch.full((1, 1, 3), 1e-35),)
    assert refused(run(gm, FoldBatchNorm(), samples=[small])) == {
        BEFORE: "the weights of convolution_default would not be finite"
    }


def test_rounding_is_that_of_one_multiplication() -> None:
    b = Build()
    gm = b.done(norm(b, conv(b, b.input(2, 8, 9, 9), b.const(draw(8, 8, 3, 3)))))
    inputs = inputs_for(gm)
    before = evaluate(gm, inputs)[0]
    run(gm, FoldBatchNorm())
    after = evaluate(gm, inputs)[0]
    # 72 products of about one each: a few float32 roundings of the largest.
    assert float((after - before).abs().max()) <= 2e-6 * float(before.abs().max())


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (1, 3, 4, 5), (1, 3, 2, 2, 2)])
def test_every_rank_splits(shape: tuple[int, ...]) -> None:
    b = Build()
    gm = b.done(norm(b, b.input(*shape)))
    assert changes(run(gm, FoldBatchNorm())) == {SPLIT: 1}
