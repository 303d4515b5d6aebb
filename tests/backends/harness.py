"""Builds small graphs by hand, compiles them, and compares with PyTorch running the same graph."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt import graph as G
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, cpu_flags, get_target, has_features
from graphopt.program.ir import Program
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import load

aten = torch.ops.aten


class Builder:
    """A graph under construction, with the inputs to run it on."""

    def __init__(self, seed: int = 0) -> None:
        self.gm = G.empty_graph()
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs: list[torch.Tensor] = []
        self.returned: list[fx.Node] = []

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def input(self, value: torch.Tensor) -> fx.Node:
        """A new input that will hold this value."""
        name = f"x{len(self.inputs)}"
        # Placeholders come first, whenever they are asked for.
        first = next(iter(self.gm.graph.nodes), None)
        at = [n for n in self.gm.graph.nodes if n.op == "placeholder"]
        if at:
            with self.gm.graph.inserting_after(at[-1]):
                node = self.gm.graph.placeholder(name)
        elif first is not None:
            with self.gm.graph.inserting_before(first):
                node = self.gm.graph.placeholder(name)
        else:
            node = self.gm.graph.placeholder(name)
        node.meta["val"] = value.to("meta")
        self.inputs.append(value)
        return node

    def constant(self, value: torch.Tensor) -> fx.Node:
        return G.add_constant(self.gm, "c", value, origin=("test",))

    def op(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return G.call(self.gm.graph, target, args, kwargs, origin=("test",))

    def returns(self, *nodes: fx.Node) -> None:
        self.returned.extend(nodes)

    def conv(
        self, x: fx.Node, channels: int, kernel: tuple[int, ...], *, stride: int | list[int] = 1,
        padding: int | list[int] = 0, dilation: int | list[int] = 1, groups: int = 1,
        bias: bool = True,
    ) -> fx.Node:  # fmt: skip
        """A convolution with random weights of a sensible size."""
        rank = len(kernel)
        weight = self.random(channels, G.shape(x)[1] // groups, *kernel)
        weight /= weight[0].numel() ** 0.5
        as_list = [v if isinstance(v, list) else [v] * rank for v in (stride, padding, dilation)]
        return self.op(
            aten.convolution.default, x, self.constant(weight),
            self.constant(self.random(channels)) if bias else None,
            *as_list, False, [0] * rank, groups,
        )  # fmt: skip

    def finish(self) -> fx.GraphModule:
        self.gm.graph.output(tuple(self.returned))
        self.gm.meta["input_names"] = tuple(f"x{i}" for i in range(len(self.inputs)))
        self.gm.meta["output_names"] = tuple(f"y{i}" for i in range(len(self.returned)))
        self.gm.recompile()
        return self.gm


def runnable(target: str | Target) -> Target:
    """The target; for x86-64-v4 where there is no AVX-512, its blocks and tiles for AVX2.

    LLVM halves the vectors then, so that what is made for AVX-512 runs on every machine: QEMU does
    not emulate it.
    """
    chosen = get_target(target)
    if chosen.name != "x86-64-v4" or has_features(chosen.features, cpu_flags()):
        return chosen
    return replace(chosen, features=get_target("x86-64-v3").features)


def compile_and_run(
    gm: fx.GraphModule, inputs: list[torch.Tensor], target: str | Target = "host", threads: int = 1
) -> tuple[Program, list[np.ndarray]]:
    """Lower, build, load and run; gives the program and the outputs."""
    chosen = runnable(target)
    program = lower(gm, chosen, "sample")
    kernels = compile_kernels(program, chosen)
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_artifact(program, chosen, kernels, Path(folder) / "out", threads=threads)
        with load(artifact.folder, threads=threads) as model:
            result = model(*(x.numpy() for x in inputs))
    return program, list(result) if isinstance(result, tuple) else [result]


def check(
    builder: Builder, *, tolerance: float = 2e-6, target: str | Target = "host", threads: int = 1
) -> Program:
    """Compile the graph and compare every output with PyTorch.

    Args:
        builder: the graph, with `returns` said.
        tolerance: largest error allowed, relative to the largest output. The default is some
            roundings of float32 sums whose terms are about as large as their result.
        target: what to build for.
        threads: threads to run with.
    """
    gm = builder.finish()
    with torch.no_grad():
        expected = gm(*builder.inputs)
    program, actual = compile_and_run(gm, builder.inputs, target, threads)
    assert len(actual) == len(expected)
    for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        wanted = theirs.numpy()
        assert ours.shape == wanted.shape
        assert ours.dtype == wanted.dtype
        assert np.isfinite(ours).all() or not np.isfinite(wanted).all(), f"output {number}"
        if wanted.size == 0:
            continue
        if wanted.dtype.kind != "f":
            np.testing.assert_array_equal(ours, wanted)
            continue
        error = np.abs(ours - wanted).max() / max(np.abs(wanted).max(), 1e-30)
        assert error <= tolerance, f"output {number}: error {error:.3g} > {tolerance:g}"
    return program


def origins(program: Program) -> list[str]:
    """Which generator made each step."""
    return [step.kernel.origin.split()[0] for step in program.steps]
