"""Every ONNX operator handler against ONNX Runtime, on one-node models."""

import numpy as np
import pytest
import torch
from onnx import helper

from graphopt.compiler import import_model
from graphopt.errors import UnsupportedError
from graphopt.importers.onnx import HANDLERS
from tests.importers.onnx_cases import assert_same, floats, graph_model, ints, one_node

F = np.float32

UNARY = [
    *("Abs", "Asinh", "Atan", "Ceil", "Cos", "Cosh", "Erf", "Exp", "Floor", "HardSwish"),
    *("Identity", "Neg", "Reciprocal", "Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Tan", "Tanh", "Mish", "IsNaN"),
]


@pytest.mark.parametrize("op", UNARY)
def test_unary(op):
    x = floats(2, 3, 5) * 3
    assert_same(one_node(op, {"x": x}), {"x": x})


@pytest.mark.parametrize("op", ["Sqrt", "Log", "Acosh"])
def test_unary_of_positive(op):
    x = np.abs(floats(2, 3)) + 1
    assert_same(one_node(op, {"x": x}), {"x": x})


@pytest.mark.parametrize("op", ["Acos", "Asin", "Atanh"])
def test_unary_of_small(op):
    x = np.tanh(floats(2, 3)) * F(0.9)
    assert_same(one_node(op, {"x": x}), {"x": x})


def test_round_to_even():
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 0.49999997], F)
    assert_same(one_node("Round", {"x": x}), {"x": x}, 0)


ACTIVATIONS = [
    ("LeakyRelu", {"alpha": 0.2}, 18),
    ("LeakyRelu", {}, 18),
    ("Elu", {"alpha": 0.7}, 18),
    ("Selu", {}, 18),
    ("Selu", {"alpha": 1.5, "gamma": 1.2}, 18),
    ("Celu", {"alpha": 0.5}, 18),
    ("HardSigmoid", {}, 18),
    ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, 18),
    ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}, 18),
    ("ThresholdedRelu", {"alpha": 0.5}, 18),
    ("Gelu", {}, 20),
    ("Gelu", {"approximate": "tanh"}, 20),
    ("Softmax", {"axis": 1}, 11),
    ("Softmax", {}, 11),
    ("Softmax", {"axis": 1}, 13),
    ("Softmax", {}, 13),
    ("LogSoftmax", {"axis": 1}, 11),
    ("LogSoftmax", {"axis": 1}, 13),
    ("LRN", {"size": 3, "alpha": 0.5, "beta": 0.6, "bias": 1.5}, 18),
    ("LRN", {"size": 5}, 18),
    ("LpNormalization", {"axis": 1, "p": 1}, 18),
    ("LpNormalization", {"axis": -1, "p": 2}, 18),
    ("GlobalAveragePool", {}, 18),
    ("GlobalMaxPool", {}, 18),
    ("Flatten", {"axis": 0}, 18),
    ("Flatten", {"axis": 2}, 18),
    ("Flatten", {"axis": -1}, 18),
    ("Transpose", {}, 18),
    ("Transpose", {"perm": [0, 2, 3, 1]}, 18),
    ("DepthToSpace", {"blocksize": 2}, 18),
    ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, 18),
    ("SpaceToDepth", {"blocksize": 2}, 18),
    ("ArgMax", {"axis": 1, "keepdims": 0}, 18),
    ("ArgMin", {"axis": -2}, 18),
    ("Dropout", {}, 18),
    ("Dropout", {"ratio": 0.4}, 11),
    ("Clip", {"min": -0.5, "max": 0.75}, 10),
    ("Squeeze", {}, 18),
    ("Unsqueeze", {"axes": [0, -1]}, 11),
    ("Shape", {}, 18),
    ("Shape", {"start": 1, "end": -1}, 18),
    ("Size", {}, 18),
    ("IsInf", {"detect_negative": 0}, 18),
    ("Cast", {"to": 7}, 18),
    ("Cast", {"to": 9}, 18),
    ("Cast", {"to": 10}, 18),
    ("Cast", {"to": 1}, 18),
]


@pytest.mark.parametrize(("op", "attributes", "opset"), ACTIVATIONS)
def test_one_input(op, attributes, opset):
    x = floats(2, 4, 4, 6)
    x[0, 0, 0, 0] = np.inf if op == "IsInf" else 0
    assert_same(one_node(op, {"x": x}, opset=opset, **attributes), {"x": x}, 2e-5)


BINARY = ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"]
BINARY += ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"]


@pytest.mark.parametrize("op", BINARY)
@pytest.mark.parametrize("constant", ["none", "left", "right", "scalar left", "scalar right"])
def test_binary(op, constant):
    x = floats(3, 1, 5)
    y = floats(4, 1, seed=1) if "scalar" not in constant else np.array(0.3, F)
    y = y + F(2) * np.sign(y)
    if constant == "none":
        assert_same(one_node(op, {"x": x, "y": y}), {"x": x, "y": y})
    else:
        order = ["y", "x"] if "left" in constant else ["x", "y"]
        assert_same(one_node(op, {"x": x}, {"y": y}, order=order), {"x": x})


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
def test_integers(op, kind):
    x, y = np.array([-7, 7, -8, 9], kind), np.array([2, -2, 3, -4], kind)
    assert_same(one_node(op, {"x": x, "y": y}), {"x": x, "y": y}, 0)
    assert_same(one_node(op, {"x": x}, {"y": np.array(3, kind)}), {"x": x}, 0)


@pytest.mark.parametrize("fmod", [0, 1])
def test_mod(fmod):
    x, y = np.array([-7, 7, -8, 9], np.int64), np.array([2, -2, 3, -4], np.int64)
    assert_same(one_node("Mod", {"x": x, "y": y}, fmod=fmod), {"x": x, "y": y}, 0)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_logic(op):
    x, y = np.array([True, True, False, False]), np.array([True, False, True, False])
    assert_same(one_node(op, {"x": x, "y": y}), {"x": x, "y": y}, 0)


@pytest.mark.parametrize("op", ["BitwiseAnd", "BitwiseOr", "BitwiseXor"])
@pytest.mark.parametrize("kind", [np.int32, np.uint8])
def test_bits(op, kind):
    x, y = np.array([[5], [255]], kind), np.array([3, 0, 12], kind)
    assert_same(one_node(op, {"x": x, "y": y}), {"x": x, "y": y}, 0)
    assert_same(one_node("BitwiseNot", {"x": x}), {"x": x}, 0)


@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_bit_shift(direction):
    x, y = np.array([[0], [1], [200], [255]], np.uint8), np.arange(8, dtype=np.uint8)
    assert_same(one_node("BitShift", {"x": x, "y": y}, direction=direction), {"x": x, "y": y}, 0)
    wide = {"x": x.astype(np.uint32), "y": y.astype(np.uint32)}
    with pytest.raises(UnsupportedError, match="only 8 bits"):
        import_model(one_node("BitShift", wide, direction=direction))


def test_not_and_where():
    c, x, y = np.array([True, False, True]), floats(3), floats(3, seed=1)
    assert_same(one_node("Not", {"c": c}), {"c": c}, 0)
    assert_same(one_node("Where", {"c": c, "x": x, "y": y}), {"c": c, "x": x, "y": y}, 0)


@pytest.mark.parametrize("exponent", [2.0, 0.5, -1.0, 3.0])
def test_power_by_number(exponent):
    x = np.abs(floats(3, 4)) + F(0.1)
    assert_same(one_node("Pow", {"x": x}, {"e": np.array(exponent, F)}), {"x": x})
    assert_same(one_node("Pow", {"x": x}, {"e": np.array([[exponent]], np.float64)}), {"x": x})


def test_power_keeps_the_type_of_its_base():
    x = np.array([1, 2, 3, 4], np.int32)
    assert_same(one_node("Pow", {"x": x}, {"e": np.array(2, np.int64)}), {"x": x}, 0)
    assert_same(one_node("Pow", {"x": x}, {"e": np.array(0.5, F)}), {"x": x}, 0)
    y = np.array([2, 0, 1, 3], np.int64)
    assert_same(one_node("Pow", {"x": x, "y": y}), {"x": x, "y": y}, 0)


@pytest.mark.parametrize("bounds", [("low",), ("low", "high"), ("", "high")])
@pytest.mark.parametrize("given", [True, False])
def test_clip(bounds, given):
    x = floats(3, 4)
    values = {"low": np.array(-0.5, F), "high": np.array(0.6, F)}
    used = {name: values[name] for name in bounds if name}
    inputs = {"x": x, **used} if given else {"x": x}
    model = one_node("Clip", inputs, {} if given else used, order=["x", *bounds])
    assert_same(model, inputs)


@pytest.mark.parametrize("shape", [(1,), (4, 1, 1), (3, 4, 5, 6)])
def test_prelu(shape):
    x = floats(3, 4, 5, 6)
    assert_same(one_node("PRelu", {"x": x}, {"s": floats(*shape, seed=1)}), {"x": x})


def test_cast_like():
    x, y = floats(3) * 5, np.zeros(1, np.int32)
    assert_same(one_node("CastLike", {"x": x, "y": y}, opset=19), {"x": x, "y": y}, 0)


REDUCTIONS = [op for op in HANDLERS if op.startswith("Reduce")]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("axes", [None, [1], [0, -1]])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("opset", [11, 18])
def test_reductions(op, axes, keep, opset):
    x = np.abs(floats(3, 4, 5)) + F(0.5)
    if opset == 11:
        attributes = {} if axes is None else {"axes": axes}
        model = one_node(op, {"x": x}, opset=11, keepdims=keep, **attributes)
    else:
        constants = {} if axes is None else {"a": ints(*axes)}
        model = one_node(op, {"x": x}, constants, keepdims=keep)
    assert_same(model, {"x": x})


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceMean"])
def test_integer_reductions(op):
    x = np.array([[1, -5, 3], [4, 7, -6]], np.int32)
    assert_same(one_node(op, {"x": x}, {"a": ints(1)}, keepdims=0), {"x": x}, 0)


@pytest.mark.parametrize("a", [(3, 4), (2, 3, 4), (2, 5, 3, 4), (4,)])
@pytest.mark.parametrize("b", [(4, 6), (4,), (1, 4, 6)])
@pytest.mark.parametrize("constant", [True, False])
def test_matmul(a, b, constant):
    x, y = floats(*a), floats(*b, seed=1)
    if constant:
        assert_same(one_node("MatMul", {"x": x}, {"y": y}), {"x": x})
    else:
        assert_same(one_node("MatMul", {"x": x, "y": y}), {"x": x, "y": y})


@pytest.mark.parametrize("flip_a", [0, 1])
@pytest.mark.parametrize("flip_b", [0, 1])
@pytest.mark.parametrize("bias", [None, (), (1,), (6,), (1, 6), (3, 1), (3, 6)])
@pytest.mark.parametrize("constant", [True, False])
def test_gemm(flip_a, flip_b, bias, constant):
    x = floats(*((4, 3) if flip_a else (3, 4)))
    others = {"b": floats(*((6, 4) if flip_b else (4, 6)), seed=1)}
    if bias is not None:
        others["c"] = np.asarray(floats(*bias, seed=2), F)
    inputs = {"x": x} if constant else {"x": x, **others}
    attributes = {"transA": flip_a, "transB": flip_b, "alpha": 0.5, "beta": 1.5}
    model = one_node("Gemm", inputs, others if constant else {}, **attributes)
    assert_same(model, inputs)


@pytest.mark.parametrize("dimensions", [2, 3, 4, 5])
def test_batch_norm(dimensions):
    x = floats(3, 4, *[5] * (dimensions - 2))
    constants = {name: floats(4, seed=i) for i, name in enumerate("sbm")}
    constants["v"] = np.abs(floats(4, seed=9)) + F(0.1)
    assert_same(one_node("BatchNormalization", {"x": x}, constants, epsilon=1e-3), {"x": x})


@pytest.mark.parametrize("dimensions", [2, 3, 4])
def test_batch_norm_in_training_mode(dimensions):
    x = floats(3, 4, *[5] * (dimensions - 2)) + F(2)
    constants = {name: floats(4, seed=i) for i, name in enumerate("sbm")}
    constants["v"] = np.abs(floats(4, seed=9)) + F(0.1)
    model = one_node("BatchNormalization", {"x": x}, constants, epsilon=1e-3, training_mode=1)
    axes = tuple(axis for axis in range(dimensions) if axis != 1)
    along = [-1 if axis == 1 else 1 for axis in range(dimensions)]
    centred = x - x.mean(axes, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-3)
    want = normal * constants["s"].reshape(along) + constants["b"].reshape(along)
    (got,) = import_model(model)(torch.from_numpy(x))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axis", [-1, 1, 2])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(axis, bias):
    x = floats(2, 3, 4)
    constants = {"s": floats(*x.shape[axis:], seed=1)}
    if bias:
        constants["b"] = floats(*x.shape[axis:], seed=2)
    assert_same(one_node("LayerNormalization", {"x": x}, constants, axis=axis), {"x": x})


@pytest.mark.parametrize(
    ("op", "attributes", "opset", "size"),
    [
        ("InstanceNormalization", {"epsilon": 1e-3}, 18, 6),
        ("GroupNormalization", {"num_groups": 3}, 18, 3),
        ("GroupNormalization", {"num_groups": 3}, 21, 6),
    ],
)
def test_group_norms(op, attributes, opset, size):
    x = floats(2, 6, 4, 5)
    constants = {"s": floats(size, seed=1), "b": floats(size, seed=2)}
    assert_same(one_node(op, {"x": x}, constants, opset=opset, **attributes), {"x": x})


SHAPES = [
    ("Reshape", (2, 3, 4), {"s": ints(0, -1)}, {}),
    ("Reshape", (2, 3, 4), {"s": ints(4, 0, -1)}, {}),
    ("Reshape", (0, 3), {"s": ints(3, 0)}, {"allowzero": 1}),
    ("Squeeze", (1, 3, 1, 4), {"a": ints(-2)}, {}),
    ("Unsqueeze", (3, 4), {"a": ints(1, -1)}, {}),
    ("Expand", (3, 1, 4), {"s": ints(2, 1, 5, 1)}, {}),
    ("Tile", (2, 3), {"r": ints(3, 2)}, {}),
    ("Tile", (2, 3), {"r": ints(1, 1)}, {}),
    ("Trilu", (2, 4, 5), {}, {}),
    ("Trilu", (2, 4, 5), {"k": np.array(-1, np.int64)}, {"upper": 0}),
    ("Gather", (4, 5), {"i": ints(-1, 0, 2)}, {"axis": 1}),
    ("Gather", (4, 5), {"i": ints(1, 2, 3)}, {"axis": 1}),
    ("Gather", (4, 5), {"i": np.array(2, np.int64)}, {}),
    ("Gather", (4, 5, 3), {"i": ints(1, 0, 2, 1).reshape(2, 2)}, {"axis": -2}),
    ("GatherND", (4, 5, 3), {"i": ints(1, 2, -1, 0).reshape(2, 2)}, {}),
    ("GatherND", (4, 5, 3), {"i": ints(1, -1).reshape(2, 1, 1)}, {}),
    ("GatherND", (2, 4, 3), {"i": ints(1, -1).reshape(2, 1)}, {"batch_dims": 1}),
    (
        "GatherND",
        (2, 2, 3, 2),
        {"i": ints(*range(-2, 2), 1, 0).reshape(1, 1, 6)[..., None].repeat(2, 0).repeat(2, 1)},
        {"batch_dims": 2},
    ),
    ("CumSum", (3, 4), {"a": np.array(1, np.int64)}, {}),
]


@pytest.mark.parametrize(("op", "shape", "constants", "attributes"), SHAPES)
def test_shapes(op, shape, constants, attributes):
    x = floats(*shape)
    assert_same(one_node(op, {"x": x}, constants, **attributes), {"x": x})


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_gather_by_inputs(shape, axis, kind):
    table, indices = floats(*shape), np.array([[0, -1], [3, 1]], kind)
    model = one_node("Gather", {"i": indices}, {"t": table}, order=["t", "i"], axis=axis)
    assert_same(model, {"i": indices}, 0)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch", [0, 1])
def test_gather_nd_by_inputs(depth, batch):
    table = floats(2, 3, 4, 5)
    indices = np.array([[[0, -1], [1, 1], [-2, 0]]] * 2, np.int64)[..., :depth]
    model = one_node("GatherND", {"i": indices}, {"t": table}, order=["t", "i"], batch_dims=batch)
    assert_same(model, {"i": indices}, 0)


def test_scatter_nd_of_constants():
    """As exporters write attention masks."""
    data, i = np.zeros((4, 3), np.float32), np.array([[1, 2], [-1, 0]], np.int64)
    nodes = [
        helper.make_node("ScatterND", ["d", "i", "u"], ["m"]),
        helper.make_node("Add", ["x", "m"], ["y"]),
    ]
    constants = {"d": data, "i": i, "u": np.array([3, 4], np.float32)}
    model = graph_model(nodes, {"x": floats(4, 3)}, constants, ["y"], 18)
    assert_same(model, {"x": floats(4, 3)}, 0)


def test_gather_elements():
    x, i = floats(3, 4), np.array([[0, -1, 2, 1]], np.int64)
    assert_same(one_node("GatherElements", {"x": x, "i": i}), {"x": x, "i": i}, 0)


@pytest.mark.parametrize("axis", [0, -1])
def test_concat(axis):
    x, y = floats(3, 3), floats(3, 3, seed=1)
    assert_same(one_node("Concat", {"x": x, "y": y}, axis=axis), {"x": x, "y": y}, 0)


@pytest.mark.parametrize(
    ("opset", "constants", "attributes"),
    [
        (11, {}, {"split": [1, 4, 2]}),
        (13, {"s": ints(1, 4, 2)}, {}),
        (18, {}, {"num_outputs": 3}),
    ],
)
def test_split(opset, constants, attributes):
    x = floats(2, 7)
    model = one_node("Split", {"x": x}, constants, opset=opset, outputs=3, axis=1, **attributes)
    assert_same(model, {"x": x}, 0)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("opset", [9, 10, 11])
def test_top_k(largest, axis, opset):
    x = np.random.default_rng(0).permutation(60).astype(F).reshape(3, 4, 5)
    if opset < 11 and not largest:
        pytest.skip("smallest since opset 11")
    more = {"largest": largest} if opset > 10 else {}
    if opset < 10:
        model = one_node("TopK", {"x": x}, opset=opset, outputs=2, axis=axis, k=3)
    else:
        constants = {"k": ints(3)}
        model = one_node("TopK", {"x": x}, constants, opset=opset, outputs=2, axis=axis, **more)
    assert_same(model, {"x": x}, 0)


def test_top_k_of_equal_elements():
    x = np.array([[2, 1, 2, 1, 2, 0, 1]], F)
    for largest in (0, 1):
        model = one_node("TopK", {"x": x}, {"k": ints(5)}, outputs=2, largest=largest)
        assert_same(model, {"x": x}, 0)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij,jk", [(3, 4), (4, 5)]),
        ("bind,bjnd->bnij", [(2, 3, 4, 5), (2, 6, 4, 5)]),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (2, 3, 5, 6)]),
        ("bhwc,hkc->bhwk", [(2, 3, 4, 5), (3, 6, 5)]),
        ("nhwpqc->nchpwq", [(1, 2, 3, 4, 5, 6)]),
        ("ij->j", [(3, 4)]),
        ("i...->...", [(3, 4, 5)]),
        ("i,j->ij", [(3,), (4,)]),
        ("i,i->", [(3,), (3,)]),
        ("ij,kj->i", [(3, 4), (5, 4)]),
        ("bi,bi->bi", [(2, 3), (2, 3)]),
        ("ba,a->b", [(3, 4), (4,)]),
        ("bi,bj,bk->bijk", [(2, 3), (2, 4), (2, 5)]),
    ],
)
def test_einsum(equation, shapes):
    inputs = {f"x{i}": floats(*shape, seed=i) for i, shape in enumerate(shapes)}
    assert_same(one_node("Einsum", inputs, equation=equation), inputs)


@pytest.mark.parametrize(
    ("equation", "reason"), [("ii->i", "diagonal"), ("ij,jk->ik", "operands"), ("i", "not fit")]
)
def test_einsum_that_is_refused(equation, reason):
    x = floats(3, 3)
    with pytest.raises(UnsupportedError, match=reason):
        import_model(one_node("Einsum", {"x": x}, equation=equation), {"x": x})


@pytest.mark.parametrize("align", [0, 1])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(("mode", "opset"), [("bilinear", 16), ("nearest", 16), ("linear", 20)])
def test_grid_sample(mode, opset, padding, align):
    inputs = {"x": floats(2, 3, 6, 7), "g": floats(2, 4, 5, 2, seed=1).clip(-1.5, 1.5)}
    attributes = {"mode": mode, "padding_mode": padding, "align_corners": align}
    assert_same(one_node("GridSample", inputs, opset=opset, **attributes), inputs)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2, 2], "strides": [2, 2, 2]},
        {"kernel_shape": [3, 3, 3], "strides": [2, 2, 2], "pads": [1, 1, 1, 1, 1, 1]},
        {"kernel_shape": [3, 2, 1], "strides": [1, 2, 1], "pads": [1, 0, 0, 0, 1, 0]},
        {"kernel_shape": [2, 3, 2], "strides": [2, 3, 2], "ceil_mode": 1},
    ],
)
def test_pooling_of_frames(op, attributes):
    x = floats(2, 3, 6, 7, 8)
    assert_same(one_node(op, {"x": x}, **attributes), {"x": x})


@pytest.mark.parametrize("constant", ["nothing", "places", "all but updates"])
@pytest.mark.parametrize(
    ("indices", "updates"),
    [
        ([[1], [-1], [0]], (3, 5, 6)),
        ([[1, -1], [0, 3]], (2, 6)),
        ([[[1, 2, 3], [0, 0, 0]]], (1, 2)),
    ],
)
def test_scatter_nd(indices, updates, constant):
    all_ = {"x": floats(4, 5, 6), "i": np.array(indices, np.int64), "u": floats(*updates, seed=2)}
    fixed = {"nothing": [], "places": ["i"], "all but updates": ["x", "i"]}[constant]
    inputs = {name: array for name, array in all_.items() if name not in fixed}
    constants = {name: all_[name] for name in fixed}
    assert_same(one_node("ScatterND", inputs, constants, order=["x", "i", "u"]), inputs, 0)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements(axis):
    places = np.argsort(floats(3, 3, 3, seed=1), axis) - 1
    inputs = {"x": floats(3, 4, 6), "i": places, "u": floats(3, 3, 3, seed=2)}
    assert_same(one_node("ScatterElements", inputs, axis=axis), inputs, 0)


FOLDS = ["add", "mul", "max", "min"]


@pytest.mark.parametrize("reduction", FOLDS)
@pytest.mark.parametrize("kind", [np.float32, np.int64])
@pytest.mark.parametrize("indices", [[[1], [-1], [1]], [[1, -1], [0, 3], [1, -1]]])
@pytest.mark.parametrize("constant", [True, False])
def test_scatter_nd_that_folds(reduction, kind, indices, constant):
    places = np.array(indices, np.int64)
    rest = (4, 5, 6)[places.shape[1] :]
    inputs = {"x": (floats(4, 5, 6) * 9).astype(kind), "i": places}
    inputs["u"] = (floats(3, *rest, seed=2) * 9).astype(kind)
    constants = {"i": inputs.pop("i")} if constant else {}
    model = one_node("ScatterND", inputs, constants, order=["x", "i", "u"], reduction=reduction)
    assert_same(model, inputs, 1e-6)


@pytest.mark.parametrize("reduction", FOLDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_elements_that_folds(reduction, axis):
    places = np.random.default_rng(0).integers(-3, 3, (3, 3, 7))
    inputs = {"x": floats(3, 4, 8), "i": places, "u": floats(3, 3, 7, seed=2)}
    model = one_node("ScatterElements", inputs, axis=axis, reduction=reduction)
    assert_same(model, inputs, 1e-6)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_cumulative_sum(exclusive, reverse, axis):
    attributes = {"exclusive": exclusive, "reverse": reverse}
    for x in (floats(3, 4), floats(1, 1), np.arange(6, dtype=np.int64).reshape(2, 3)):
        model = one_node("CumSum", {"x": x}, {"a": np.array(axis, np.int64)}, **attributes)
        assert_same(model, {"x": x})


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_cumulative_product(exclusive, reverse):
    """Held to numpy: ONNX Runtime has no such kernel yet."""
    x = floats(3, 4)
    constants = {"a": np.array(1, np.int64)}
    attributes = {"exclusive": exclusive, "reverse": reverse}
    model = one_node("CumProd", {"x": x}, constants, opset=26, **attributes)
    ways = x[:, ::-1] if reverse else x
    if exclusive:
        ways = np.concatenate([np.ones((3, 1), F), ways[:, :-1]], 1)
    want = np.cumprod(ways, 1)[:, ::-1] if reverse else np.cumprod(ways, 1)
    (got,) = import_model(model)(torch.from_numpy(x))
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", [None, 0, 1, -2])
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.float32])
@pytest.mark.parametrize("values", [[0, 1], [2.5, -1]])
def test_one_hot(axis, kind, values):
    indices = np.array([[0, 3, -1], [-4, 4, -5]], kind)
    attributes = {} if axis is None else {"axis": axis}
    constants = {"d": np.array(4, kind), "v": np.array(values, F)}
    model = one_node("OneHot", {"i": indices}, constants, **attributes)
    assert_same(model, {"i": indices}, 0)


def test_one_hot_of_values_known_at_run_time():
    inputs = {"i": np.array([2, 0], np.int64), "v": np.array([0.5, 3], F)}
    model = one_node("OneHot", inputs, {"d": ints(3)}, order=["i", "d", "v"])
    assert_same(model, inputs, 0)


@pytest.mark.parametrize(("time", "batch"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("constant", [True, False])
def test_reverse_sequence(time, batch, constant):
    x = floats(*((5, 4) if time == 0 else (4, 5)), 3)
    lengths = {"n": ints(1, 5, 3, 2)}
    inputs = {"x": x} if constant else {"x": x, **lengths}
    model = one_node(
        "ReverseSequence", inputs, lengths if constant else {}, time_axis=time, batch_axis=batch
    )
    assert_same(model, inputs, 0)


REGIONS = [[0, 0, 7, 5], [1.3, 2.1, 9.7, 8.2], [-4, -3, 3, 30], [5, 5, 5.2, 5.1], [20, 20, 30, 30]]


@pytest.mark.parametrize("mode", ["avg", "max"])
@pytest.mark.parametrize("coordinates", [None, "half_pixel", "output_half_pixel"])
@pytest.mark.parametrize(("ratio", "size", "scale"), [(2, (3, 2), 0.5), (1, (1, 4), 1.0)])
def test_roi_align(mode, coordinates, ratio, size, scale):
    attributes = {"mode": mode, "sampling_ratio": ratio, "spatial_scale": scale}
    attributes |= {"output_height": size[0], "output_width": size[1]}
    if coordinates:
        attributes["coordinate_transformation_mode"] = coordinates
    inputs = {"x": floats(2, 3, 8, 10), "r": np.array(REGIONS, F), "i": ints(0, 1, 1, 0, 1)}
    for opset in (16,) if coordinates else (10, 16):
        assert_same(one_node("RoiAlign", inputs, opset=opset, **attributes), inputs, 2e-6)


def test_roi_align_whose_samples_depend_on_the_regions():
    inputs = {"x": floats(1, 3, 8, 10), "r": np.array(REGIONS[:1], F), "i": ints(0)}
    with pytest.raises(UnsupportedError, match="depends on the regions"):
        import_model(one_node("RoiAlign", inputs, opset=16))
