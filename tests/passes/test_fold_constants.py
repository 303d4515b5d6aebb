"""fold_constants: what does not depend on inputs is computed once, unless that costs too much."""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed
from pass_graphs import Build, aten, changes, ops, refusals, run

from graphopt import graph as g
from graphopt.passes import Context
from graphopt.passes.fold_constants import FoldConstants


def test_chains_of_constants_fold() -> None:
    b = Build()
    steps = b.call(aten.arange.default, 6, dtype=torch.float32, device=torch.device("cpu"))
    angle = b.call(aten.cos.default, b.call(aten.mul.Tensor, steps, b.const(torch.tensor(0.5))))
    gm = b.done(b.call(aten.mul.Tensor, b.input(6), angle))
    result = run(gm, FoldConstants())
    assert ops(gm) == ["mul"]
    assert changes(result) == {
        "fold arange.default": 1,
        "fold mul.Tensor": 1,
        "fold cos.default": 1,
    }
    (constant,) = (n for n in gm.graph.nodes if n.op == "get_attr")
    assert set(g.origin(constant)) == {"op1", "op3", "op4", "const2"}
    assert len(list(gm.named_buffers())) == 1


def test_growth_is_refused() -> None:
    b = Build()
    wide = b.call(aten.expand.default, b.const(torch.ones(1, 16)), [1 << 15, 16])
    gm = b.done(b.call(aten.add.Tensor, b.input(1 << 15, 16), wide))
    reason = "the result would take 2097088 bytes more than what it is computed from"
    assert refusals(run(gm, FoldConstants())) == {"fold expand.default": reason}
    assert ops(gm) == ["expand", "add"]
    run(gm, FoldConstants(growth=1 << 22))
    assert ops(gm) == ["add"]


def test_shared_constants_do_not_pay_for_the_result() -> None:
    b = Build()
    table = b.const(torch.ones(8, 8))
    flipped = b.call(aten.permute.default, table, [1, 0])
    gm = b.done(
        b.call(aten.matmul.default, b.input(8, 8), flipped),
        b.call(aten.add.Tensor, b.input(8, 8), table),
    )
    assert "256 bytes more" in refusals(run(gm, FoldConstants(growth=0)))["fold permute.default"]


def test_random_ops_are_refused() -> None:
    b = Build()
    noise = b.call(aten.bernoulli.p, b.const(torch.ones(4)), 0.5)
    gm = b.done(b.call(aten.add.Tensor, b.input(4), noise))
    gm.meta["passes"] = ("canonicalize",)
    result = FoldConstants()(gm, Context())
    assert refusals(result) == {"fold bernoulli.p": "its result is random"}


def test_quantized_constants_stay_integers() -> None:
    b = Build()
    stored = b.const(torch.ones(4, dtype=torch.int8))
    q = torch.ops.quantized_decomposed
    real = b.call(q.dequantize_per_tensor.default, stored, 0.5, 0, -128, 127, torch.int8)
    gm = b.done(b.call(aten.add.Tensor, b.input(4), real))
    (reason,) = refusals(run(gm, FoldConstants())).values()
    assert reason == "quantized constants stay integers"


def test_ops_with_several_results_are_refused() -> None:
    b = Build()
    both = b.call(aten.topk.default, b.const(torch.rand(5)), 2)
    gm = b.done(b.call(aten.add.Tensor, b.input(2), b.item(both, 0)))
    assert refusals(run(gm, FoldConstants())) == {
        "fold topk.default": "not an operator with one result"
    }


def test_what_pytorch_cannot_compute_is_refused() -> None:
    b = Build()
    bad = b.call(aten.index_select.default, b.const(torch.ones(3)), 0, b.const(torch.tensor([7])))
    gm = b.done(b.input(2), bad)
    gm.meta["passes"] = ("canonicalize",)
    (reason,) = refusals(FoldConstants()(gm, Context())).values()
    assert reason.startswith("PyTorch cannot compute it: ")
