"""eliminate_common_subexpressions and eliminate_dead_code."""

from __future__ import annotations

import torch
from pass_graphs import Build, aten, changes, ops, refusals, run

from graphopt import graph as g
from graphopt.passes import Context
from graphopt.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphopt.passes.eliminate_dead_code import EliminateDeadCode


def test_equal_nodes_merge_in_one_run() -> None:
    b = Build()
    x = b.input(3)
    left = b.call(aten.exp.default, b.call(aten.relu.default, x))
    right = b.call(aten.exp.default, b.call(aten.relu.default, x))
    gm = b.done(b.call(aten.add.Tensor, left, right))
    result = run(gm, EliminateCommonSubexpressions())
    assert ops(gm) == ["relu", "exp", "add"]
    assert changes(result) == {"merge equal relu.default": 1, "merge equal exp.default": 1}
    assert g.origin(left) == ("op2", "op4")


def test_arguments_that_only_compare_equal_stay_apart() -> None:
    b = Build()
    x = b.input(3)
    numbers = (1, 1.0, True, 0.0, -0.0)
    made = [b.call(aten.mul.Tensor, x, number) for number in numbers]
    gm = b.done(*made)
    run(gm, EliminateCommonSubexpressions())
    assert len(ops(gm)) == len(numbers)


def test_equal_constants_merge() -> None:
    b = Build()
    x = b.input(3)
    nan = torch.tensor([1.0, float("nan"), 0.0])
    made = [
        b.call(aten.add.Tensor, x, b.const(c.clone()))
        for c in (nan, nan, nan * 1.0, torch.tensor([1.0, float("nan"), -0.0]), nan.double())
    ]
    gm = b.done(*made)
    result = run(gm, EliminateCommonSubexpressions())
    assert changes(result)["merge equal constant"] == 2
    assert len(ops(gm)) == 3
    assert len(list(gm.named_buffers())) == 3


def test_random_ops_do_not_merge() -> None:
    b = Build()
    x = b.input(3)
    gm = b.done(b.call(aten.bernoulli.p, x, 0.5), b.call(aten.bernoulli.p, x, 0.5))
    gm.meta["passes"] = ("canonicalize",)
    assert not EliminateCommonSubexpressions()(gm, Context()).changed


def test_dead_nodes_and_constants_go_but_inputs_stay() -> None:
    b = Build()
    x, _unread = b.input(3), b.input(2)
    b.call(aten.exp.default, b.call(aten.add.Tensor, x, b.const(torch.ones(3))))
    b.gm.register_buffer("orphan", torch.ones(2))
    gm = b.done(b.call(aten.relu.default, x))
    result = run(gm, EliminateDeadCode())
    assert changes(result) == {
        "remove unread call_function": 2,
        "remove unread get_attr": 1,
        "remove unread constant data": 2,
    }
    assert ops(gm) == ["relu"]
    assert len(g.placeholders(gm)) == 2
    assert list(gm.named_buffers()) == []


def test_ops_with_side_effects_are_kept() -> None:
    b = Build()
    x = b.call(aten.neg.default, b.input(3))
    b.call(aten.relu_.default, x)
    gm = b.done(x)
    result = run(gm, EliminateDeadCode())
    assert refusals(result) == {"remove unread node": "it writes into its input"}
    assert ops(gm) == ["neg", "relu_"]
