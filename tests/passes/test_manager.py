"""The pass manager: order, verification after each pass, comparing values, dumps, records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from pass_graphs import Build, aten
from torch import fx

from graphopt import graph as g
from graphopt.errors import GraphoptError, VerifyError
from graphopt.passes import (
    APPROX,
    EXACT,
    LOSSY,
    Context,
    Effect,
    NoteBook,
    Pass,
    PassResult,
    all_passes,
    default_pipeline,
    resolve,
    run_passes,
)


def relu_graph() -> fx.GraphModule:
    b = Build()
    x = b.input(2, 3)
    return b.done(b.call(aten.relu.default, b.call(aten.mul.Tensor, x, 2.0)))


def _replace_relu(gm: fx.GraphModule, target: object, *args: object) -> PassResult:
    notes = NoteBook()
    for node in list(gm.graph.nodes):
        if node.target is aten.relu.default:
            with gm.graph.inserting_before(node):
                new = g.call(gm.graph, target, (node.args[0], *args), origin=g.origin(node))  # type: ignore[arg-type]
            notes.changed("replace relu", g.origin(node))
            g.replace(node, new)
    return notes.result()


@dataclass(frozen=True)
class Wrong(Pass):
    """Claims to be exact and turns relu into abs."""

    name = "wrong"
    effect = EXACT

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        return _replace_relu(graph, aten.abs.default)


@dataclass(frozen=True)
class Rounding(Pass):
    """Turns relu into something a little off."""

    name = "rounding"
    effect = APPROX(rtol=1e-2, atol=0.0)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        return _replace_relu(graph, aten.hardtanh.default, 0.001, 1000.0)


@dataclass(frozen=True)
class Lossy(Pass):
    """Turns relu into abs, and says so."""

    name = "lossy"
    effect = LOSSY
    after = ("wrong",)

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        return _replace_relu(graph, aten.abs.default)


@dataclass(frozen=True)
class Breaking(Pass):
    """Leaves a graph without origins."""

    name = "breaking"
    effect = EXACT

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        result = _replace_relu(graph, aten.abs.default)
        for node in graph.graph.nodes:
            node.meta.pop("origin", None)
        return result


def test_wrong_values_are_caught_at_level_two_only(monkeypatch: pytest.MonkeyPatch) -> None:
    run_passes(relu_graph(), [Wrong()])
    with pytest.raises(VerifyError, match="pass wrong is declared EXACT, but on sample 0 output 0"):
        run_passes(relu_graph(), [Wrong()], Context(verify=2))
    monkeypatch.setenv("GRAPHOPT_VERIFY", "2")
    with pytest.raises(VerifyError, match="not bit for bit"):
        run_passes(relu_graph(), [Wrong()])
    monkeypatch.setenv("GRAPHOPT_VERIFY", "yes")
    with pytest.raises(GraphoptError, match="GRAPHOPT_VERIFY is 'yes'"):
        run_passes(relu_graph(), [Wrong()])


def test_comparison_uses_the_callers_samples() -> None:
    harmless = ((torch.ones(2, 3),),)
    run_passes(relu_graph(), [Wrong()], Context(verify=2, samples=harmless))
    with pytest.raises(GraphoptError, match="sample inputs do not fit"):
        run_passes(relu_graph(), [Wrong()], Context(verify=2, samples=((torch.ones(2),),)))


def test_approximate_passes_may_round() -> None:
    (record,) = run_passes(relu_graph(), [Rounding()], Context(verify=2))
    assert record.error is not None
    assert 0 < record.error < 1e-2


def test_lossy_passes_always_measure_their_error() -> None:
    gm = relu_graph()
    gm.meta["passes"] = ("wrong",)
    (record,) = run_passes(gm, [Lossy()])
    assert record.error is not None
    assert record.error > 0.1


def test_a_pass_that_breaks_the_graph_is_named() -> None:
    with pytest.raises(VerifyError, match="broken after pass breaking") as caught:
        run_passes(relu_graph(), [Breaking()])
    assert "abs" in str(caught.value)


def test_a_broken_import_is_named() -> None:
    gm = relu_graph()
    next(iter(gm.graph.nodes)).next.meta["origin"] = ()
    with pytest.raises(VerifyError, match="broken after import"):
        run_passes(gm, [])


def test_order_is_checked() -> None:
    with pytest.raises(GraphoptError, match="pass lossy has to run after wrong"):
        run_passes(relu_graph(), [Lossy(), Wrong()])
    gm = relu_graph()
    run_passes(gm, [Wrong()])
    run_passes(gm, [Lossy()])
    assert gm.meta["passes"] == ("wrong", "lossy")


def test_dump_writes_numbered_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_DUMP", str(tmp_path / "dump"))
    run_passes(relu_graph(), resolve(["canonicalize", "simplify"]))
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files == ["00_import.txt", "01_canonicalize.txt", "02_simplify.txt"]
    text = (tmp_path / "dump" / "00_import.txt").read_text(encoding="utf-8")
    assert "torch.ops.aten.relu.default" in text
    (line,) = [line for line in text.splitlines() if line.startswith("relu")]
    assert line.split() == ["relu_default", "aten.relu.default", "2×3", "float32", "op2"]


def test_records_are_plain_data() -> None:
    gm = relu_graph()
    (record,) = run_passes(gm, [Wrong()])
    data = json.loads(json.dumps(record.as_dict()))
    assert data["name"] == "wrong"
    assert (data["nodes_before"], data["nodes_after"], data["changed"]) == (2, 2, True)
    assert data["notes"] == [
        {"action": "changed", "what": "replace relu", "reason": "", "count": 1, "origins": ["op2"]}
    ]
    assert str(record) == "wrong: 2 → 2 ops\n  replace relu (at op2)"
    torch.testing.assert_close(gm(torch.tensor([[-1.0] * 3] * 2))[0], torch.full((2, 3), 2.0))


def test_the_contract_is_enforced() -> None:
    with pytest.raises(TypeError, match="name must be an identifier"):

        class NoName(Pass):
            """Nameless."""

            effect = EXACT

    with pytest.raises(TypeError, match="effect must be EXACT"):

        class NoEffect(Pass):
            """No effect."""

            name = "no_effect"

    with pytest.raises(TypeError, match="needs a docstring"):

        class NoDocstring(Pass):
            name = "silent"
            effect = EXACT

    with pytest.raises(TypeError, match="after must be a tuple"):

        class OneString(Pass):
            """Gives a string where a tuple belongs."""

            name = "one_string"
            effect = EXACT
            after = "canonicalize"  # type: ignore[assignment]

    class Plain(Pass):
        """Not a dataclass of its own."""

        name = "plain"
        effect = EXACT

        def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
            return PassResult(False)

    with pytest.raises(TypeError, match=r"must be a @dataclass\(frozen=True\)"):
        Plain()
    with pytest.raises(ValueError, match="a tolerance is a finite number"):
        APPROX(-1.0, 0.0)


@dataclass(frozen=True)
class Liar(Pass):
    """Says the wrong thing about what it did."""

    name = "liar"
    effect: Effect = EXACT  # type: ignore[misc]
    says: object = None
    does: bool = False

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        if self.does:
            _replace_relu(graph, aten.abs.default)
        return self.says  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("says", "does", "message"),
    [
        (None, False, "returned NoneType, not PassResult"),
        (PassResult(True), False, "says it changed the graph but did not change it"),
        (PassResult(False), True, "says it kept the graph but changed it"),
    ],
)
def test_results_are_checked(says: object, does: bool, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        run_passes(relu_graph(), [Liar(EXACT, says, does)])


def test_resolve() -> None:
    assert resolve(None) == default_pipeline()
    assert [p.name for p in resolve(["simplify", Wrong()])] == ["simplify", "wrong"]
    with pytest.raises(GraphoptError, match="there is no pass 'fold_batchnorm'") as caught:
        resolve(["fold_batchnorm"])
    assert "did you mean fold_batch_norm" in str(caught.value)


def test_all_passes_describe_themselves() -> None:
    names = [each.name for each in all_passes()]
    assert len(set(names)) == len(names)
    assert all(each.summary.endswith((".", ";")) for each in all_passes())
    ran: set[str] = set()
    for each in default_pipeline():
        assert set(each.after) <= ran
        ran.add(each.name)
