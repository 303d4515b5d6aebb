"""What is won by making an expanded image in the kernel that filters it (`kernels/expand.py`)?

    python bench/expand.py                      # pairs of layers, of several sizes
    python bench/expand.py my.onnx --threads 2  # whole models

Each is built twice, for this machine and for one whose caches hold every image, where the two
convolutions are two kernels. They run in turn; the fastest run counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import fx, nn

from bench import onnx_models
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, host
from graphopt.importers import import_model
from graphopt.passes.base import Context
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.program.ir import Program
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import load


def pairs() -> Iterator[tuple[str, fx.GraphModule]]:
    """MobileNetV2's first pairs, and larger ones, as parts of a network."""
    torch.manual_seed(0)
    sizes = [(16, 96, side) for side in (112, 160, 224, 320, 512)]
    sizes += [(24, 144, side) for side in (56, 128, 192, 256)]
    for (channels, wide, side), stride in product(sizes, (1, 2)):
        module = nn.Sequential(
            nn.Conv2d(3, channels, 1), nn.Conv2d(channels, wide, 1), nn.ReLU6(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide), nn.ReLU6(), nn.Conv2d(wide, 8, 1),
        )  # fmt: skip
        graph = import_model(module.eval(), (torch.randn(1, 3, side, side),))
        yield f"{channels} → {wide} on {side}², stride {stride}", graph


def model(name: str) -> tuple[str, fx.GraphModule]:
    """An .onnx file, or one of the models by name."""
    found = onnx_models.find(name)
    return found.name, import_model(str(found.path), found.compile_inputs())


def built(gm: fx.GraphModule, target: Target) -> tuple[Program, Program]:
    """As two kernels, and as it is built for the target."""
    with torch.no_grad():
        run_passes(gm, resolve(None), Context())
    return lower(gm, replace(target, last_bytes=1 << 62), "apart"), lower(gm, target, "joined")


def seconds(programs: Sequence[Program], target: Target, threads: int, runs: int) -> list[float]:
    """The fastest run of each, in turn."""
    with ExitStack() as stack:
        models = []
        for program in programs:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "artifact"
            kernels = compile_kernels(program, target)
            build_artifact(program, target, kernels, folder, threads=threads)
            models.append(stack.enter_context(load(folder, threads=threads)))
        times = [[min(each.time(4)) for each in models] for _ in range(runs)]
    return [float(best) for best in np.min(times, axis=0)]


def graphs(names: Sequence[str]) -> Iterator[tuple[str, fx.GraphModule]]:
    """What to build: the models of these names, or all pairs."""
    yield from (model(name) for name in names) if names else pairs()


def main() -> None:
    """Build, time, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=10, help="each of four runs")
    options = parser.parse_args()
    target = host()
    table = Table("network", "joined pairs", "apart, ms", "joined, ms", "faster",
                  "arena apart, MB", "joined, MB", box=None)  # fmt: skip
    for name, gm in graphs(options.models):
        programs = built(gm, target)
        joined = sum(step.kernel.origin.startswith("expand") for step in programs[1].steps)
        if not joined:
            table.add_row(name, "0")  # The caches hold its images.
            continue
        apart, together = seconds(programs, target, options.threads, options.runs)
        table.add_row(
            name, str(joined), f"{apart * 1e3:.2f}", f"{together * 1e3:.2f}",
            f"{1 - together / apart:.0%}", *(f"{p.arena / 1e6:.1f}" for p in programs),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
