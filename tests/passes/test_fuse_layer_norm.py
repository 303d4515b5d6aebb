"""fuse_layer_norm: every way to write it, weight and bias taken in, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from pass_graphs import Build, aten, changes, ops, refusals, run
from test_fold_batch_norm import draw
from torch import fx, nn

from graphopt import graph as g
from graphopt.importers import import_model
from graphopt.passes import Context, default_pipeline, run_passes
from graphopt.passes.fuse_layer_norm import FuseLayerNorm

add, sub, mul, div = aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor
power, mean = aten.pow.Tensor_Scalar, aten.mean.dim

FUSE = "fuse layer_norm"
AFFINE = "take weight or bias into layer_norm"

SQUARES: dict[str, Callable[[Build, fx.Node], fx.Node]] = {
    "mul": lambda b, d: b.call(mul, d, d),
    "pow": lambda b, d: b.call(power, d, 2.0),
}
QUOTIENTS: dict[str, Callable[[Build, fx.Node, fx.Node], fx.Node]] = {
    "div sqrt": lambda b, d, v: b.call(div, d, b.call(aten.sqrt.default, v)),
    "div pow": lambda b, d, v: b.call(div, d, b.call(power, v, 0.5)),
    "mul rsqrt": lambda b, d, v: b.call(mul, d, b.call(aten.rsqrt.default, v)),
    "rsqrt mul": lambda b, d, v: b.call(mul, b.call(aten.rsqrt.default, v), d),
    "mul pow": lambda b, d, v: b.call(mul, d, b.call(power, v, -0.5)),
    "mul reciprocal sqrt": lambda b, d, v: b.call(
        mul, d, b.call(aten.reciprocal.default, b.call(aten.sqrt.default, v))
    ),
    "mul 1 / sqrt": lambda b, d, v: b.call(
        mul, d, b.call(div, b.const(1.0), b.call(aten.sqrt.default, v))
    ),
}


def source(b: Build, *sizes: int, dtype: torch.dtype = torch.float32) -> fx.Node:
    return b.call(mul, b.input(*(sizes or (2, 3, 4, 5)), dtype=dtype), 3.0)


def average(b: Build, x: fx.Node, axes: list[int], drop: bool = False) -> fx.Node:
    """The mean, straight or by way of one without the dimensions."""
    if not drop:
        return b.call(mean, x, axes, True)
    sizes = [1 if axis in axes else n for axis, n in enumerate(g.shape(x))]
    return b.call(aten.reshape.default, b.call(mean, x, axes, False), sizes)


def written_out(
    b: Build,
    x: fx.Node,
    axes: list[int],
    square: str = "mul",
    quotient: str = "div sqrt",
    eps: float | None = 1e-5,
    drop: bool = False,
    flip: bool = False,
) -> fx.Node:
    middle = average(b, x, axes, drop)
    centred = b.call(sub, x, middle)
    squared = b.call(sub, middle, x) if flip else centred
    variance = average(b, SQUARES[square](b, squared), axes, drop)
    if eps is not None:
        variance = b.call(add, variance, eps)
    return QUOTIENTS[quotient](b, centred, variance)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([[3], [2, 3], [1, 2, 3]]),
    st.sampled_from(sorted(SQUARES)),
    st.sampled_from(sorted(QUOTIENTS)),
    st.sampled_from([None, 0.0, 1e-12, 1e-5, 0.5]),
    st.booleans(),
    st.booleans(),
)
def test_all_forms(
    axes: list[int], square: str, quotient: str, eps: float | None, drop: bool, flip: bool
) -> None:
    b = Build()
    gm = b.done(written_out(b, source(b), axes, square, quotient, eps, drop, flip))
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1}
    assert ops(gm) == ["mul", "layer_norm"]
    (norm,) = (n for n in gm.graph.nodes if n.target is aten.layer_norm.default)
    assert norm.args[1] == [2, 3, 4, 5][axes[0] :]
    assert norm.args[4] == (eps or 0.0)


def test_double_precision() -> None:
    b = Build()
    gm = b.done(written_out(b, source(b, 3, 5, dtype=torch.float64), [1]))
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1}


@pytest.mark.parametrize("sizes", [(5,), (1, 5), (1, 1, 1, 5), (4, 5), (4, 1), (1, 4, 5)])
def test_weight_and_bias_of_any_shape_that_broadcasts(sizes: tuple[int, ...]) -> None:
    b = Build()
    x = written_out(b, source(b), [2, 3])
    x = b.call(mul, b.const(draw(*sizes)), x)
    gm = b.done(b.call(add, x, b.const(draw(*sizes))))
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1, AFFINE: 2}
    assert ops(gm) == ["mul", "layer_norm"]


def test_weight_without_bias_and_bias_without_weight() -> None:
    for op in (mul, add):
        b = Build()
        gm = b.done(b.call(op, written_out(b, source(b), [3]), b.const(draw(5))))
        assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1, AFFINE: 1}
        assert ops(gm) == ["mul", "layer_norm"]


@pytest.mark.parametrize("order", ["(c w) / s", "(w c) r", "c (r w)"])
def test_weight_before_the_division(order: str) -> None:
    b = Build()
    x, weight = source(b), b.const(draw(5))
    c = b.call(sub, x, b.call(mean, x, [3], True))
    variance = b.call(add, b.call(mean, b.call(mul, c, c), [3], True), 1e-5)
    if order == "(c w) / s":
        y = b.call(div, b.call(mul, c, weight), b.call(aten.sqrt.default, variance))
    else:
        r = b.call(aten.rsqrt.default, variance)
        first, second = ((weight, c), r) if order == "(w c) r" else ((r, weight), c)
        y = b.call(mul, b.call(mul, *first), second)
    gm = b.done(y)
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1}
    assert ops(gm) == ["mul", "layer_norm"]


def test_the_weight_keeps_its_tensor() -> None:
    b = Build()
    weight = b.const(draw(5))
    one = b.call(mul, written_out(b, source(b), [3]), weight)
    gm = b.done(b.call(mul, written_out(b, one, [3]), weight))
    run(gm, FuseLayerNorm())
    assert sum(t.numel() == 5 for t in gm.buffers()) == 1


OUTSIDE: dict[str, Callable[[Build, fx.Node], fx.Node]] = {
    "weight after bias": lambda b, x: b.call(
        mul, b.call(add, x, b.const(draw(5))), b.const(draw(5))
    ),
    "weight along another dimension": lambda b, x: b.call(mul, x, b.const(draw(4, 1))),
    "weight computed": lambda b, x: b.call(mul, x, b.call(aten.exp.default, b.input(5))),
    "a number": lambda b, x: b.call(mul, x, 0.5),
    "one more bias": lambda b, x: b.call(add, b.call(add, x, b.const(draw(5))), b.const(draw(5))),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_stays_outside(name: str) -> None:
    b = Build()
    gm = b.done(OUTSIDE[name](b, written_out(b, source(b), [3])))
    run(gm, FuseLayerNorm())
    assert ops(gm)[-1] in ("mul", "add")
    assert "layer_norm" in ops(gm)


def test_instance_norm_keeps_its_scale_outside() -> None:
    b = Build()
    x = b.call(mul, written_out(b, source(b), [2, 3]), b.const(draw(3, 1, 1)))
    gm = b.done(b.call(add, x, b.const(draw(3, 1, 1))))
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1}
    assert ops(gm) == ["mul", "layer_norm", "mul", "add"]


def folded(b: Build, x: fx.Node, weight: fx.Node, bias: fx.Node) -> fx.Node:
    """x · k + (bias − mean · k) with k = weight / √(variance + eps), as Keras writes it."""
    middle = b.call(mean, x, [3], True)
    centred = b.call(sub, x, middle)
    variance = b.call(add, b.call(mean, b.call(mul, centred, centred), [3], True), 1e-3)
    k = b.call(mul, b.call(aten.rsqrt.default, variance), weight)
    return b.call(add, b.call(mul, x, k), b.call(sub, bias, b.call(mul, middle, k)))


def test_weight_and_bias_folded() -> None:
    b = Build()
    gm = b.done(folded(b, source(b), b.const(draw(5)), b.const(draw(1, 1, 1, 5))))
    assert changes(run(gm, FuseLayerNorm())) == {FUSE: 1}
    assert ops(gm) == ["mul", "layer_norm"]


@pytest.mark.parametrize("axes", [[1], [0, 3], [1, 2]])
def test_dimensions_in_the_middle_are_refused(axes: list[int]) -> None:
    b = Build()
    gm = b.done(written_out(b, source(b), axes))
    reason = f"it normalizes dimensions {axes} of 4, not trailing ones"
    assert refusals(run(gm, FuseLayerNorm())) == {FUSE: reason}


def test_half_precision_is_refused() -> None:
    b = Build()
    gm = b.done(written_out(b, source(b, 2, 5, dtype=torch.float16), [1]))
    reason = "sums in torch.float16 would round differently"
    assert refusals(run(gm, FuseLayerNorm())) == {FUSE: reason}


def test_eps_outside_the_root_is_refused() -> None:
    b = Build()
    x = source(b)
    centred = b.call(sub, x, b.call(mean, x, [3], True))
    variance = b.call(mean, b.call(mul, centred, centred), [3], True)
    deviation = b.call(add, b.call(aten.sqrt.default, variance), 1e-6)
    gm = b.done(b.call(div, centred, deviation))
    reason = "eps is added to the standard deviation, not to the variance"
    assert refusals(run(gm, FuseLayerNorm())) == {FUSE: reason}


@pytest.mark.parametrize("name", ["mean_dim", "sub_tensor", "sqrt_default"])
def test_shared_intermediate_values_are_refused(name: str) -> None:
    b = Build()
    root = written_out(b, source(b), [3])
    shared = next(n for n in b.gm.graph.nodes if n.name == name)
    gm = b.done(root, b.call(aten.exp.default, shared))
    reason = f"its intermediate value {name} is also read by exp_default"
    assert refusals(run(gm, FuseLayerNorm())) == {FUSE: reason}


def test_a_norm_read_elsewhere_keeps_its_weight_outside() -> None:
    b = Build()
    norm = written_out(b, source(b), [3])
    gm = b.done(b.call(mul, norm, b.const(draw(5))), b.call(aten.exp.default, norm))
    result = run(gm, FuseLayerNorm())
    assert changes(result) == {FUSE: 1}
    reason = "the result of layer_norm_default is also read by exp_default"
    assert refusals(result) == {AFFINE: reason}


def _of_another(b: Build) -> fx.Node:
    """Centred around the mean of something else."""
    x, y = source(b), b.input(2, 3, 4, 5)
    centred = b.call(sub, x, b.call(mean, y, [3], True))
    variance = b.call(mean, b.call(mul, centred, centred), [3], True)
    return b.call(div, centred, b.call(aten.sqrt.default, variance))


def _other_axes(b: Build) -> fx.Node:
    x = source(b)
    centred = b.call(sub, x, b.call(mean, x, [3], True))
    variance = b.call(mean, b.call(mul, centred, centred), [2, 3], True)
    return b.call(div, centred, b.call(aten.sqrt.default, variance))


def _unbiased(b: Build) -> fx.Node:
    x = source(b)
    centred = b.call(sub, x, b.call(mean, x, [3], True))
    variance = b.call(mul, b.call(mean, b.call(mul, centred, centred), [3], True), 5 / 4)
    return b.call(div, centred, b.call(aten.sqrt.default, variance))


def _root_mean_square(b: Build) -> fx.Node:
    x = source(b)
    square = b.call(add, b.call(mean, b.call(mul, x, x), [3], True), 1e-5)
    return b.call(div, x, b.call(aten.sqrt.default, square))


def _not_centred(b: Build) -> fx.Node:
    x = source(b)
    centred = b.call(sub, x, b.call(mean, x, [3], True))
    variance = b.call(mean, b.call(mul, centred, centred), [3], True)
    return b.call(div, x, b.call(aten.sqrt.default, variance))


@pytest.mark.parametrize(
    "build", [_of_another, _other_axes, _unbiased, _root_mean_square, _not_centred]
)
def test_other_functions_stay(build: Callable[[Build], fx.Node]) -> None:
    b = Build()
    result = run(b.done(build(b)), FuseLayerNorm())
    assert not result.changed
    assert not result.notes


class Written(nn.Module):
    """As models write it in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(draw(6))
        self.bias = nn.Parameter(draw(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(2, 5, 6)
        middle = x.mean(-1, keepdim=True)
        variance = (x - middle).pow(2).mean(-1, keepdim=True)
        x = self.weight * (x - middle) / torch.sqrt(variance + 1e-6) + self.bias
        variance, middle = torch.var_mean(x, -1, correction=0, keepdim=True)
        return (x - middle) * torch.rsqrt(variance + 1e-6)


def test_from_pytorch_through_the_pipeline() -> None:
    x = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    gm = import_model(Written().eval(), (x,))
    run_passes(gm, default_pipeline(), Context(verify=2))
    assert ops(gm).count("layer_norm") == 2
    torch.testing.assert_close(gm(x)[0], Written()(x), rtol=1e-5, atol=1e-5)


def test_from_onnx_through_the_pipeline(tmp_path: Path) -> None:
    def const(name: str, tensor: torch.Tensor) -> onnx.TensorProto:
        return helper.make_tensor(
            name, TensorProto.FLOAT, list(tensor.shape), tensor.flatten().tolist()
        )

    node = helper.make_node
    nodes = [
        node("ReduceMean", ["x"], ["mean"], axes=[-1]),
        node("Sub", ["x", "mean"], ["a"]),
        node("Sub", ["x", "mean"], ["b"]),
        node("Pow", ["a", "two"], ["square"]),
        node("ReduceMean", ["square"], ["variance"], axes=[-1]),
        node("Add", ["variance", "eps"], ["more"]),
        node("Sqrt", ["more"], ["deviation"]),
        node("Div", ["b", "deviation"], ["normal"]),
        node("Mul", ["normal", "weight"], ["scaled"]),
        node("Add", ["bias", "scaled"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "written_out",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 6])],
        [
            const("two", torch.tensor([2.0])),
            const("eps", torch.tensor(1e-5)),
            const("weight", draw(6)),
            const("bias", draw(6)),
        ],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), path)
    gm = import_model(path)
    run_passes(gm, default_pipeline(), Context(verify=2))
    assert ops(gm) == ["layer_norm"]
