"""Broken graphs of every kind, each caught by the verifier with its origin."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization.fx._decomposed
from pass_graphs import Build, aten, ops
from torch import fx

from graphopt import graph as g
from graphopt.errors import VerifyError
from graphopt.passes import interface_of, verify

q = torch.ops.quantized_decomposed


def good() -> fx.GraphModule:
    b = Build()
    x = b.input(2, 3)
    total = b.call(aten.add.Tensor, x, b.const(torch.ones(3)))
    return b.done(b.call(aten.relu.default, total), total)


def node(gm: fx.GraphModule, name: str) -> fx.Node:
    return next(n for n in gm.graph.nodes if n.name.startswith(name))


def test_a_good_graph_passes() -> None:
    verify(good(), interface=interface_of(good()))


def _module_call(gm: fx.GraphModule) -> None:
    gm.add_submodule("sub", torch.nn.ReLU())
    with gm.graph.inserting_before(g.output_node(gm)):
        gm.graph.call_module("sub", (node(gm, "add"),)).meta["val"] = g.value(node(gm, "add"))


def _method_call(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(g.output_node(gm)):
        gm.graph.call_method("relu", (node(gm, "add"),)).meta["val"] = g.value(node(gm, "add"))


def _python_function(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = torch.relu


def _foreign_namespace(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = torch.ops.prims.abs.default


def _no_val(gm: fx.GraphModule) -> None:
    del node(gm, "relu").meta["val"]


def _val_is_no_tensor(gm: fx.GraphModule) -> None:
    node(gm, "relu").meta["val"] = 3


def _val_on_cpu(gm: fx.GraphModule) -> None:
    node(gm, "relu").meta["val"] = torch.zeros(2, 3)


def _wrong_shape(gm: fx.GraphModule) -> None:
    node(gm, "relu").meta["val"] = torch.empty(3, 2, device="meta")


def _wrong_dtype(gm: fx.GraphModule) -> None:
    node(gm, "relu").meta["val"] = torch.empty(2, 3, dtype=torch.float64, device="meta")


def _arguments_do_not_fit(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = aten.matmul.default
    node(gm, "relu").args = (node(gm, "add"), node(gm, "add"))


def _unknown_parameter(gm: fx.GraphModule) -> None:
    node(gm, "relu").kwargs = {"slope": 1}


def _too_many_arguments(gm: fx.GraphModule) -> None:
    node(gm, "relu").args = (node(gm, "add"), 1)


def _no_origin(gm: fx.GraphModule) -> None:
    del node(gm, "relu").meta["origin"]


def _empty_origin(gm: fx.GraphModule) -> None:
    node(gm, "relu").meta["origin"] = ()


def _missing_constant(gm: fx.GraphModule) -> None:
    delattr(gm, str(node(gm, "c").target))


def _constant_changed(gm: fx.GraphModule) -> None:
    setattr(gm, str(node(gm, "c").target), torch.ones(1))


def _used_before_computed(gm: fx.GraphModule) -> None:
    node(gm, "relu").append(node(gm, "add"))


def _dangling(gm: fx.GraphModule) -> None:
    node(gm, "relu").args = (next(iter(good().graph.nodes)),)


def _users_out_of_step(gm: fx.GraphModule) -> None:
    node(gm, "add").users.pop(node(gm, "relu"))


def _output_not_a_tuple(gm: fx.GraphModule) -> None:
    g.output_node(gm).args = (node(gm, "relu"),)


def _output_of_a_number(gm: fx.GraphModule) -> None:
    g.output_node(gm).args = ((node(gm, "relu"), 3),)


def _no_output(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(g.output_node(gm))


def _wrong_names(gm: fx.GraphModule) -> None:
    gm.meta["input_names"] = ("a", "b")


def _twice_the_same_name(gm: fx.GraphModule) -> None:
    gm.meta["output_names"] = ("y", "y")


def _renamed_input(gm: fx.GraphModule) -> None:
    gm.meta["input_names"] = ("other",)


def _outputs_swapped(gm: fx.GraphModule) -> None:
    gm.meta["output_names"] = tuple(reversed(gm.meta["output_names"]))


def _output_type_changed(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(g.output_node(gm)):
        flat = g.call(gm.graph, aten.reshape.default, (node(gm, "add"), [6]), origin=("reshape",))
    g.output_node(gm).args = ((node(gm, "relu"), flat),)


def _getitem_of_one_result(gm: fx.GraphModule) -> None:
    node(gm, "relu").target = operator.getitem
    node(gm, "relu").args = (node(gm, "add"), 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_module_call, "kind call_module is not allowed"),
        (_method_call, "kind call_method is not allowed"),
        (_python_function, "not a torch operator"),
        (_foreign_namespace, "calls prims.abs.default, only aten"),
        (_no_val, "has no meta['val']"),
        (_val_is_no_tensor, "meta['val'] is int, not a tensor"),
        (_val_on_cpu, "is on cpu, not on the meta device"),
        (_wrong_shape, "says shape [3, 2], the op gives [2, 3]"),
        (_wrong_dtype, "says torch.float64, the op gives torch.float32"),
        (_arguments_do_not_fit, "its arguments do not fit aten.matmul.default"),
        (_unknown_parameter, "aten.relu.default has no parameter slope"),
        (_too_many_arguments, "takes 1 positional arguments, not 2"),
        (_no_origin, "has no origin"),
        (_empty_origin, "has no origin"),
        (_missing_constant, "is not a buffer of the module"),
        (_constant_changed, "the constant is torch.float32[1]"),
        (_used_before_computed, "before it is computed"),
        (_dangling, "which is not in the graph"),
        (_users_out_of_step, "is missing among the users of"),
        (_output_not_a_tuple, "must be a tuple of nodes"),
        (_output_of_a_number, "must be a tuple of nodes"),
        (_no_output, "exactly one output node, this one has 0"),
        (_wrong_names, "the graph has 1 inputs"),
        (_twice_the_same_name, "the graph has 2 outputs"),
        (_renamed_input, "the interface changed: input_names"),
        (_outputs_swapped, "the interface changed: output_names"),
        (_output_type_changed, "the interface changed: outputs"),
        (_getitem_of_one_result, "getitem of something that has one result"),
    ],
)
def test_broken_graphs_are_caught(damage: Callable[[fx.GraphModule], None], message: str) -> None:
    gm = good()
    interface = interface_of(gm)
    damage(gm)
    with pytest.raises(VerifyError) as caught:
        verify(gm, stage="pass test", interface=interface)
    assert message in str(caught.value)
    assert "after pass test" in str(caught.value)


def test_all_problems_are_listed_with_their_origins() -> None:
    gm = good()
    node(gm, "relu").target = torch.relu
    node(gm, "add").kwargs = {"beta": 2}
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert "2 problem(s)" in str(caught.value)
    assert set(caught.value.where) == {"op2", "op3"}


def test_results_of_several_tensors_only_under_getitem() -> None:
    b = Build()
    x = b.input(4, 3)
    pieces = b.call(aten.split.Tensor, x, 2)
    first = b.item(pieces, 0)
    gm = b.done(first)
    assert ops(gm) == ["split", "getitem"]
    verify(gm)
    first.args = (pieces, 2)
    with pytest.raises(VerifyError, match="getitem 2 of 2 results"):
        verify(gm)


def test_a_symbolic_shape_is_caught() -> None:
    b = Build()
    gm = b.done(b.input(2))
    ep = torch.export.export(
        torch.nn.ReLU(), (torch.ones(4),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    fake = next(n for n in ep.graph.nodes if n.op == "placeholder").meta["val"]
    next(iter(gm.graph.nodes)).meta["val"] = fake
    with pytest.raises(VerifyError, match=r"not static|not on the meta device"):
        verify(gm)


QUANTIZE = {"scale": 0.5, "zero_point": 0, "quant_min": -128, "quant_max": 127}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"scale": 0.0}, "scale 0.0 is not a positive finite number"),
        ({"scale": -1.0}, "scale -1.0 is not"),
        ({"scale": float("inf")}, "scale inf is not"),
        ({"scale": float("nan")}, "scale nan is not"),
        ({"zero_point": 200}, "zero point 200 is outside -128..127"),
        ({"quant_max": 255}, "clamps to -128..255, torch.int8 holds -128..127"),
        ({"quant_min": 127}, "clamps to 127..127"),
    ],
)
def test_quantization_parameters(change: dict[str, float], message: str) -> None:
    b = Build()
    x = b.input(2, 3)
    arguments = {**QUANTIZE, **change}
    # Built with good parameters: PyTorch itself rejects some of the bad ones.
    quantized = b.call(q.quantize_per_tensor.default, x, *QUANTIZE.values(), torch.int8)
    gm = b.done(quantized)
    quantized.args = (x, *arguments.values(), torch.int8)
    if not message:
        verify(gm)
        return
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("scales", "points", "axis", "message"),
    [
        ([0.5, 1.0, 2.0], [0, 0, 0], 1, ""),
        ([0.5, 0.0, 2.0], [0, 0, 0], 1, "scale 0.0 is not"),
        ([0.5, 1.0, 2.0], [0, 0, 300], 1, "zero point 300 is outside"),
        ([0.5, 1.0], [0, 0], 1, "2 scales for 3 channels"),
    ],
)
def test_quantization_per_channel(
    scales: list[float], points: list[int], axis: int, message: str
) -> None:
    b = Build()
    x = b.input(2, 3)
    s, p = b.const(torch.tensor(scales)), b.const(torch.tensor(points))
    node = b.gm.graph.call_function(
        q.quantize_per_channel.default, (x, s, p, axis, -128, 127, torch.int8)
    )
    node.meta.update(val=torch.empty(2, 3, dtype=torch.int8, device="meta"), origin=("q",))
    gm = b.done(node)
    if not message:
        verify(gm)
        return
    with pytest.raises(VerifyError) as caught:
        verify(gm)
    assert message in str(caught.value)
