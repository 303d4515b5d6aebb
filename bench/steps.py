"""How fast are the steps of whole models, by the operations that their kernels do?

    python bench/steps.py                        # nine models
    python bench/steps.py resnet18 my.onnx

One thread, the fastest of many runs of each step, as it runs in the model. Listed are the
convolutions and matrix products of more than 20 MFLOP that do not reach 85 % of the peak.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import onnx_models, peak
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, host
from graphopt.errors import GraphoptError
from graphopt.importers import import_model
from graphopt.passes.base import Context
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.program.ir import Program, Step
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import load

LARGE = 20e6
"""Operations from which on a step counts."""
ENOUGH = 0.85
"""Share of the peak that it should reach."""
PRODUCTS = {"convolution", "linear", "matmul"}


@dataclass(frozen=True)
class Timed:
    """A step of a model.

    Attributes:
        step: what it is.
        seconds: its fastest run.
    """

    step: Step
    seconds: float

    @property
    def gflops(self) -> float:
        """Operations of the kernel, 10⁹ per second."""
        return self.step.own_flops / self.seconds / 1e9


def lowered(name: str, target: Target) -> Program:
    """A model, an .onnx file or the name of one, as steps.

    Raises:
        GraphoptError: no such model, or it cannot be imported.
    """
    model = onnx_models.find(name)
    with torch.no_grad():
        graph = import_model(str(model.path), model.compile_inputs())
        run_passes(graph, resolve(None), Context())
        return lower(graph, target, "model")


def time_steps(name: str, target: Target, runs: int) -> Iterator[Timed]:
    """All steps of a model, each with its fastest run."""
    program = lowered(name, target)
    with tempfile.TemporaryDirectory() as folder:
        artifact = build_artifact(
            program, target, compile_kernels(program, target), Path(folder) / "out"
        )
        with load(artifact.folder, 1) as model:
            every = np.array([[seconds for _, seconds in model.profile()] for _ in range(runs)])
    for step, seconds in zip(program.steps, every.min(axis=0), strict=True):
        yield Timed(step, float(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=onnx_models.EXPORTED)
    parser.add_argument("--runs", type=int, default=60, help="of each model")
    options = parser.parse_args()

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    top = peak.measure()
    table = Table(box=None, pad_edge=False)
    for column in ("model", "generator", "MFLOP", "µs", "GFLOP/s", "of peak", "operators", "from"):
        words = column in ("model", "generator", "operators", "from")
        table.add_column(column, justify="left" if words else "right", no_wrap=column != "from")
    reached = large = 0
    for name in options.models:
        try:
            steps = list(time_steps(name, host(), options.runs))
        except GraphoptError as error:
            parser.error(str(error))
        for timed in steps:
            step = timed.step
            if step.own_flops < LARGE or not PRODUCTS.intersection(step.ops):
                continue
            large += 1
            reached += timed.gflops >= ENOUGH * top
            if timed.gflops < ENOUGH * top:
                table.add_row(
                    name, step.kernel.origin, f"{step.own_flops / 1e6:.1f}",
                    f"{timed.seconds * 1e6:.1f}", f"{timed.gflops:.1f}",
                    f"{timed.gflops / top:.0%}", " + ".join(step.ops), ", ".join(step.origin[:1]),
                )  # fmt: skip
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"peak of one core: {top:.1f} GFLOP/s")
    print(f"{reached} of {large} steps with more than {LARGE / 1e6:.0f} MFLOP reach {ENOUGH:.0%}")


if __name__ == "__main__":
    main()
