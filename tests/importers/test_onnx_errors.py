"""What users are told when an ONNX model or its example inputs cannot be used."""

import hashlib

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from graphopt.errors import GraphoptError, InputError, ModelError, UnsupportedError
from graphopt.importers import import_model
from tests.importers.onnx_cases import floats, graph_model, ints, one_node, value_info

F = np.float32


def message(error_type, model, inputs=None):
    with pytest.raises(GraphoptError) as caught:
        import_model(model, inputs)
    assert type(caught.value) is error_type
    return str(caught.value)


def open_model():
    """Two inputs, `a` of (batch, 3, ?) and `b` of (batch, 4), and a fixed one."""
    a = helper.make_tensor_value_info("a", 1, ["batch", 3, None])
    b = helper.make_tensor_value_info("b", 7, ["batch", 4])
    c = helper.make_tensor_value_info("c", 1, [2])
    nodes = [
        helper.make_node("Relu", ["a"], ["y"]),
        helper.make_node("Neg", ["b"], ["z"]),
        helper.make_node("Neg", ["c"], ["w"]),
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in "yzw"]
    graph = helper.make_graph(nodes, "open", [a, b, c], outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def test_all_unsupported_operators_at_once():
    x = floats(1, 4, 6, 6)
    nodes = [
        helper.make_node("NonMaxSuppression", ["x", "x"], ["n"], name="nms"),
        helper.make_node("Relu", ["n"], ["r"], name="fine"),
        helper.make_node("Det", ["r"], ["d"], name="det"),
        helper.make_node("FusedConv", ["x"], ["f"], name="fused", domain="com.microsoft"),
        helper.make_node("Dropout", ["x"], ["m", "where"], name="drop"),
        helper.make_node("Cast", ["where"], ["i"], to=1),
    ]
    model = graph_model(nodes, {"x": x}, {}, ["d", "f", "m", "i"], 18)
    text = message(UnsupportedError, model)
    assert "4 operators" in text
    assert "ONNX node 'nms' (NonMaxSuppression): no such operator is known" in text
    assert "ONNX node 'det' (Det): no such operator is known" in text
    assert "'fused' (FusedConv): it belongs to the operator domain 'com.microsoft'" in text
    assert "'drop' (Dropout): only its first output can be used" in text
    assert "fine" not in text


def test_unused_operators_do_not_matter():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Det", ["x"], ["unused"])]
    import_model(graph_model(nodes, {"x": floats(2, 2)}, {}, ["y"], 18))


def test_shapes_computed_from_inputs():
    x, s = floats(2, 3), ints(3, 2)
    text = message(UnsupportedError, one_node("Reshape", {"x": x, "s": s}))
    assert "its sizes are computed from the model's inputs; they must be constant" in text


def test_training_mode():
    x = floats(2, 3)
    constants = {name: np.ones(3, F) for name in "sbmv"}
    node = helper.make_node("BatchNormalization", ["x", *"sbmv"], ["y", "mean", "variance"],
                            training_mode=1)  # fmt: skip
    model = graph_model([node], {"x": x}, constants, ["y", "mean"], 18)
    assert "its running statistics are results" in message(UnsupportedError, model)
    model = one_node("Dropout", {"x": x}, {"r": np.array(0.5, F), "t": np.array(True)})
    assert "it is in training mode" in message(UnsupportedError, model)


def test_open_dimensions():
    text = message(ModelError, open_model())
    assert "'a' (batch, 3, ?); 'b' (batch, 4)" in text
    assert "inputs={'a': numpy.zeros((N, 3, D2), 'float32')" in text
    assert "'b': numpy.zeros((N, 4), 'int64')}, with numbers for D2, N" in text


def test_open_dimensions_from_examples():
    a, b = np.zeros((5, 3, 7), F), np.zeros((5, 4), np.int64)
    gm = import_model(open_model(), {"a": a, "b": b})
    shapes = [tuple(n.meta["val"].shape) for n in gm.graph.nodes if n.op == "placeholder"]
    assert shapes == [(5, 3, 7), (5, 4), (2,)]
    import_model(open_model(), (a, b, np.zeros(2, F)))


def test_examples_that_do_not_fit():
    a, b, c = np.zeros((5, 3, 7), F), np.zeros((5, 4), np.int64), np.zeros(2, F)
    model = open_model()
    assert "the model has 3 inputs, 2 examples were given" in message(InputError, model, (a, b))
    text = message(InputError, model, {"a": a, "bee": b})
    assert "no input 'bee'" in text
    assert "'b' is missing" in text
    assert "'a' has the shape (5, 2, 7), the model takes (batch, 3, ?)" in message(
        InputError, model, (a[:, :2], b, c)
    )
    assert "'a' has the shape (3, 7)" in message(InputError, model, (a[0], b, c))
    text = message(InputError, model, (a.astype(float), b, c))
    assert "'a' has the dtype float64, the model takes float32" in text
    assert "array.astype('float32')" in text
    text = message(InputError, model, (a, b[:4], c))
    assert "share the dimension 'batch', which is 5 in one and 4 in the other" in text
    assert "is a int" in message(InputError, model, (a, b, 3))
    assert "which no model can take" in message(InputError, model, (a, b, np.array(["x"])))


def test_files_that_are_not_models(tmp_path):
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"\x00\x01 this is not a model \xff" * 20)
    assert "is not an ONNX file, or it is damaged" in message(ModelError, junk)
    junk.write_bytes(b"")
    assert "its graph has no outputs" in message(ModelError, junk)
    whole = one_node("MatMul", {"x": floats(2, 3)}, {"w": floats(3, 400)}).SerializeToString()
    junk.write_bytes(whole[: len(whole) // 2])
    assert "damaged" in message(ModelError, junk)


def test_the_file_and_the_proto_are_left_as_they_are(tmp_path):
    model = one_node("MatMul", {"x": floats(2, 3)}, {"w": floats(3, 4)})
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    before = hashlib.sha256(path.read_bytes()).digest(), model.SerializeToString()
    import_model(path)
    gm = import_model(model)
    for buffer in gm.buffers():
        buffer.zero_()
    assert before == (hashlib.sha256(path.read_bytes()).digest(), model.SerializeToString())


def test_external_data(tmp_path):
    model = one_node("MatMul", {"x": floats(2, 30)}, {"w": floats(30, 40)})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    import_model(path)
    without = onnx.load(path, load_external_data=False)
    text = message(ModelError, without)
    assert "refers to tensors in other files: weights.bin" in text
    (tmp_path / "weights.bin").write_bytes(b"short")
    assert "external data of" in message(ModelError, path)
    (tmp_path / "weights.bin").unlink()
    text = message(ModelError, path)
    assert "keeps its weights in weights.bin, which is not there" in text
    assert f"put weights.bin next to the model, in {tmp_path}" in text


@pytest.mark.parametrize(
    ("opset", "expected"), [(99, "uses opset 99"), (5, "older than the oldest supported, 7")]
)
def test_opsets(opset, expected):
    assert expected in message(ModelError, one_node("Relu", {"x": floats(2)}, opset=opset))


def test_no_opset():
    model = one_node("Relu", {"x": floats(2)})
    del model.opset_import[:]
    assert "does not say which version" in message(ModelError, model)


def test_invalid_graphs():
    x = {"x": floats(2)}
    cycle = [
        helper.make_node("Add", ["x", "b"], ["a"], name="first"),
        helper.make_node("Relu", ["a"], ["b"], name="second"),
    ]
    text = message(ModelError, graph_model(cycle, x, {}, ["b"], 18))
    assert "it has a cycle" in text
    assert "'first' (Add)" in text
    loose = [helper.make_node("Add", ["x", "nowhere"], ["y"], name="loose")]
    text = message(ModelError, graph_model(loose, x, {}, ["y"], 18))
    assert "nothing makes 'nowhere'" in text
    assert "'loose' (Add)" in text
    twice = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["x"], ["y"])]
    assert "'y' is made twice" in message(ModelError, graph_model(twice, x, {}, ["y"], 18))
    one = [helper.make_node("Relu", ["x"], ["y"])]
    assert "nothing makes its output 'z'" in message(ModelError, graph_model(one, x, {}, ["z"], 18))


def test_unordered_nodes_are_put_in_order():
    nodes = [helper.make_node("Exp", ["a"], ["y"]), helper.make_node("Neg", ["x"], ["a"])]
    gm = import_model(graph_model(nodes, {"x": floats(2)}, {}, ["y"], 18))
    assert gm(torch.zeros(2))[0].tolist() == [1.0, 1.0]


def test_operators_that_do_not_fit_their_inputs():
    model = one_node("MatMul", {"x": floats(2, 3)}, {"w": floats(4, 5)})
    text = message(ModelError, model)
    assert "does not fit its inputs (float32(2, 3), float32(4, 5))" in text
    assert "ONNX node 'the_MatMul' (MatMul)" in text


def test_strings_are_refused():
    names = numpy_helper.from_array(np.array(["a", "b"], object), "names")
    node = helper.make_node("Identity", ["names"], ["y"])
    graph = helper.make_graph([node], "g", [], [onnx.ValueInfoProto(name="y")], [names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert "the element type STRING" in message(UnsupportedError, model)
    text = helper.make_tensor_value_info("x", onnx.TensorProto.STRING, [2])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [text],
                              [value_info("y", floats(2))])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    assert "input 'x' cannot be used" in message(ModelError, model)
