"""ONNX graphs of several nodes: constants, branches, functions, names and origins."""

import numpy as np
import pytest
from onnx import helper, numpy_helper

from graphopt.importers import import_model
from tests.importers.onnx_cases import (
    assert_same,
    floats,
    graph_model,
    ints,
    one_node,
    value_info,
)


def test_constants_are_evaluated_and_shape_chains_vanish():
    x = floats(2, 3, 4)
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Slice", ["shape", "zero", "one"], ["batch"]),
        helper.make_node("Constant", [], ["rest"], value_ints=[-1]),
        helper.make_node("Concat", ["batch", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["x", "sizes"], ["y"]),
    ]
    model = graph_model(nodes, {"x": x}, {"zero": ints(0), "one": ints(1)}, ["y"], 13)
    gm = import_model(model)
    assert [node.op for node in gm.graph.nodes] == ["placeholder", "call_function", "output"]
    assert_same(model, {"x": x}, 0)


def test_giant_constants_are_not_evaluated():
    sizes = ints(1 << 13, 1 << 13)
    gm = import_model(one_node("ConstantOfShape", {"x": floats(1)}, {"s": sizes}, order=["s"]))
    assert sum(buffer.numel() for buffer in gm.buffers()) < 100


def test_constants_of_no_dimension():
    """Transformers' masks, exported for batches: ConstantOfShape of an empty shape is a scalar."""
    fill = helper.make_tensor("value", 1, [1], [2.5])
    nodes = [
        helper.make_node("ConstantOfShape", ["none"], ["c"], value=fill),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    none = np.zeros(0, np.int64)
    assert_same(graph_model(nodes, {"x": floats(3)}, {"none": none}, ["y"], 17), {"x": floats(3)})


@pytest.mark.parametrize("condition", [True, False])
def test_if_with_a_constant_condition(condition):
    def branch(op):
        out = helper.make_tensor_value_info("z", 1, [2])
        return helper.make_graph([helper.make_node(op, ["x"], ["z"])], op, [], [out])

    node = helper.make_node(
        "If", ["c"], ["y"], then_branch=branch("Exp"), else_branch=branch("Neg")
    )
    model = graph_model([node], {"x": floats(2)}, {"c": np.array(condition)}, ["y"], 18)
    assert_same(model, {"x": floats(2)})


def test_branches_read_values_from_outside():
    def branch(op):
        out = helper.make_tensor_value_info("z", 1, [2])
        return helper.make_graph([helper.make_node(op, ["outer"], ["z"])], op, [], [out])

    nodes = [
        helper.make_node("Tanh", ["x"], ["outer"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("Exp"), else_branch=branch("Neg")),
    ]
    model = graph_model(nodes, {"x": floats(2)}, {"c": np.array(True)}, ["y"], 18)
    assert_same(model, {"x": floats(2)})


def test_model_local_functions_are_inlined():
    body = [helper.make_node("Mul", ["a", "a"], ["b"]), helper.make_node("Exp", ["b"], ["c"])]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "ExpSquare", ["a"], ["c"], body, opsets[:1])
    node = helper.make_node("ExpSquare", ["x"], ["y"], domain="own")
    x = floats(3)
    graph = helper.make_graph([node], "g", [value_info("x", x)], [value_info("y", x)])
    model = helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    assert_same(model, {"x": x})


def test_initializers_that_are_also_inputs_are_constants():
    x, w = floats(2, 3), floats(3, 4, seed=1)
    model = one_node("MatMul", {"x": x, "w": w}, {}, opset=11)
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    gm = import_model(model)
    assert gm.meta["input_names"] == ("x",)
    assert_same(model, {"x": x})


def test_names_and_origins():
    x = floats(1, 2, 5, 5)
    model = one_node("Conv", {"image/0": x}, {"w": floats(3, 2, 3, 3)})
    gm = import_model(model)
    assert gm.meta["input_names"] == ("image/0",)
    assert gm.meta["output_names"] == ("y0",)
    conv = next(node for node in gm.graph.nodes if node.op == "call_function")
    assert conv.meta["origin"] == ("ONNX node 'the_Conv' (Conv)",)
    assert "w" in dict(gm.named_buffers())
