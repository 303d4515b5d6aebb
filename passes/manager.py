"""The pass manager: runs passes in order, verifies, compares, dumps and records."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt import graph as g
from graphopt.errors import GraphoptError, VerifyError
from graphopt.passes import _numeric
from graphopt.passes._nodes import results
from graphopt.passes.base import Context, Note, Pass
from graphopt.passes.verify import Verifier, interface_of, verify


@dataclass(frozen=True)
class PassRecord:
    """What one pass did, for the report.

    Attributes:
        name: the pass.
        effect: what it may do to values, as text.
        changed: whether it changed the graph.
        seconds: its run time, without verification.
        nodes_before: operator nodes before it.
        nodes_after: operator nodes after it.
        notes: what it changed and what it refused.
        error: the largest error of an output relative to its largest value, where it was measured
            (`GRAPHOPT_VERIFY=2`, and always for lossy passes).
    """

    name: str
    effect: str
    changed: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    notes: tuple[Note, ...]
    error: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data for JSON."""
        return {
            "name": self.name,
            "effect": self.effect,
            "changed": self.changed,
            "seconds": self.seconds,
            "nodes_before": self.nodes_before,
            "nodes_after": self.nodes_after,
            "notes": [note.as_dict() for note in self.notes],
            "error": self.error,
        }

    def __str__(self) -> str:
        """Lines for the report."""
        head = f"{self.name}: {self.nodes_before} → {self.nodes_after} ops"
        if self.error is not None:
            head += f", error {self.error:.2g}"
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], ctx: Context | None = None
) -> list[PassRecord]:
    """Run the passes on `gm`, in place, and say what each did.

    The graph's form is verified before the first and after every pass. With `GRAPHOPT_VERIFY=2`
    (or `ctx.verify`) the outputs before and after each pass are compared by its effect; with
    `GRAPHOPT_DUMP=folder` (or `ctx.dump`) the graph is written there after each pass.

    Raises:
        GraphoptError: a pass needs another to have run before it.
        VerifyError: a pass broke the graph, or moved its outputs more than it may.
    """
    ctx = ctx or Context()
    level = _verify_level(ctx)
    dump = _dump_folder(ctx)
    _check_order(gm, passes)
    verifier = Verifier()
    verify(gm, stage="import", verifier=verifier)
    interface = interface_of(gm)
    dump_graph(gm, dump, 0, "import")
    compare = level >= 2 or any(p.effect.kind == "lossy" for p in passes)
    samples = _samples(gm, ctx) if compare else ()
    expected = [_numeric.evaluate(gm, inputs) for inputs in samples]
    records = []
    for number, each in enumerate(passes, start=1):
        before = _count(gm)
        start = time.perf_counter()
        result = each(gm, ctx)
        seconds = time.perf_counter() - start
        verify(gm, stage=f"pass {each.name}", interface=interface, verifier=verifier)
        dump_graph(gm, dump, number, each.name)
        error = None
        if compare and result.changed:
            actual = [_numeric.evaluate(gm, inputs) for inputs in samples]
            error = _compare(each, expected, actual)
            expected = actual
        records.append(
            PassRecord(
                each.name,
                str(each.effect),
                result.changed,
                seconds,
                before,
                _count(gm),
                result.notes,
                error,
            )
        )
        gm.meta["passes"] = (*gm.meta.get("passes", ()), each.name)
    gm.recompile()
    return records


def dump_graph(gm: fx.GraphModule, folder: Path | None, number: int, name: str) -> None:
    """Write the graph as code and as a table to `folder/NN_name.txt`, if there is a folder."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{gm.graph.python_code('self').src.strip()}\n\n{table(gm)}\n"
    (folder / f"{number:02d}_{name}.txt").write_text(text, encoding="utf-8")


def table(gm: fx.GraphModule) -> str:
    """The graph's nodes as a table: name, op, shape, dtype, origin."""
    rows = [("name", "op", "shape", "dtype", "origin")]
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        types = results(node)
        op = str(node.target) if node.op == "call_function" else f"{node.op} {node.target}"
        shapes = " ".join("×".join(map(str, val.shape)) or "scalar" for val in types)
        dtypes = " ".join(str(val.dtype).removeprefix("torch.") for val in types)
        rows.append((node.name, op, shapes, dtypes, "; ".join(g.origin(node))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]])
        for row in rows
    )


def _count(gm: fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in gm.graph.nodes)


def _verify_level(ctx: Context) -> int:
    text = os.environ.get("GRAPHOPT_VERIFY", "1") if ctx.verify is None else str(ctx.verify)
    if text not in ("1", "2"):
        raise GraphoptError(
            f"GRAPHOPT_VERIFY is {text!r}",
            hint="1 checks the graph after every pass (always done), 2 also compares outputs",
        )
    return int(text)


def _dump_folder(ctx: Context) -> Path | None:
    if ctx.dump is not None:
        return ctx.dump
    named = os.environ.get("GRAPHOPT_DUMP")
    return Path(named) if named else None


def _check_order(gm: fx.GraphModule, passes: Sequence[Pass]) -> None:
    done = set(gm.meta.get("passes", ()))
    for each in passes:
        missing = [name for name in each.after if name not in done]
        if missing:
            raise GraphoptError(
                f"pass {each.name} has to run after {', '.join(missing)}",
                hint=f"put {', '.join(missing)} before {each.name} in the list of passes",
            )
        done.add(each.name)


def _samples(gm: fx.GraphModule, ctx: Context) -> tuple[tuple[torch.Tensor, ...], ...]:
    samples = _numeric.sample_inputs(gm, ctx)
    for inputs in samples:
        given = [(tuple(t.shape), t.dtype) for t in inputs]
        wanted = [(g.shape(node), g.value(node).dtype) for node in g.placeholders(gm)]
        if given != wanted:
            raise GraphoptError(
                f"sample inputs do not fit the model: they are {given}, it takes {wanted}",
                hint="give one tensor per input, in the model's order",
            )
    return samples


def _compare(each: Pass, expected: list[_numeric.Outputs], actual: list[_numeric.Outputs]) -> float:
    for number, (before, after) in enumerate(zip(expected, actual, strict=True)):
        problem = _numeric.disagreement(each.effect, before, after)
        if problem:
            raise VerifyError(
                f"pass {each.name} is declared {each.effect}, but on sample {number} {problem}",
                hint=f"this is a bug in pass {each.name}; leave it out with the `passes` argument",
            )
    return max(
        (_numeric.difference(b, a) for b, a in zip(expected, actual, strict=True)), default=0.0
    )
