"""How fast is each layer's kernel, and was it the right one? One layer at a time, every choice.

    python bench/kernels.py                        # the layers of nine common networks
    python bench/kernels.py --only "k3 p1$"        # those whose text matches
    python bench/kernels.py --model mobilenet_v2   # a model's own: a name or an .onnx file
    python bench/kernels.py "conv 16x56x56 32 k3 p1" "linear 128x384 1536"

A layer runs as inside a network, its input just written and its weights long out of the caches, on
one core, the choices in turn; the best of many runs counts. GFLOP/s are of the operations that the
kernel itself does (Winograd's products and transforms are fewer than the layer's), beside the peak.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import onnx_models, peak
from bench.common_layers import COMMON_LAYERS
from bench.layers import Layer, build, layers_of, parse
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.kernels.base import Alternatives
from graphopt.backends.lower import TUNED, lower
from graphopt.backends.target import Target, host
from graphopt.errors import GraphoptError
from graphopt.importers import import_model
from graphopt.passes.base import Context
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.program.ir import Program
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import LoadedModel, load
from graphopt.runtime.profile import profile_steps

CACHES = 64 << 20
"""Bytes to read for the weights to leave the caches."""


@dataclass(frozen=True)
class Choice:
    """One way to compute a layer.

    Attributes:
        generator: the generator and its configuration.
        chosen: whether graphopt takes this one.
        flops: operations the kernel does.
        predicted: seconds by the cost functions that chose, None where there are none.
        measured: seconds.
    """

    generator: str
    chosen: bool
    flops: int
    predicted: float | None
    measured: float


@dataclass(frozen=True)
class Candidate:
    """A choice that is built and waits to be measured; `step` is the layer's in the model."""

    generator: str
    flops: int
    model: LoadedModel
    step: int


def algorithm_of(generator: str) -> str:
    """`F(2×2,3×3)` and the like, or the generator's name."""
    name, *rest = generator.split()
    return rest[0] if name == "winograd" else name


def prepare(layer: Layer, choice: str | None, target: Target, folder: Path) -> Candidate:
    """Build a layer one way."""
    graph, op = build(layer)
    with torch.no_grad():
        program = lower(graph, target, "layer", choice=lambda _: choice)
    number = step_of(layer, program, op)
    artifact = build_artifact(program, target, compile_kernels(program, target), folder)
    step = program.steps[number]
    generator = step.kernel.origin.removesuffix(TUNED)
    return Candidate(generator, step.own_flops, load(artifact.folder, 1), number)


def step_of(layer: Layer, program: Program, op: str) -> int:
    """The layer's step: a convolution stands between two others, unless it is the first."""
    steps = [number for number, step in enumerate(program.steps) if op in step.ops]
    return steps[-2] if layer.op == "conv" else steps[0]


def choices_of(layer: Layer, target: Target, tiles: bool) -> dict[str | None, float | None]:
    """The ways there are, graphopt's own the first, each with its estimated cycles.

    With `tiles` all, else one of each algorithm; None where there is no choice.
    """
    graph, op = build(layer)
    asked: list[Alternatives] = []

    def note(alternatives: Alternatives) -> None:
        asked.append(alternatives)

    with torch.no_grad():
        program = lower(graph, target, "layer", choice=note)
    origin = program.steps[step_of(layer, program, op)].kernel.origin
    for alternatives in asked[-2:]:
        if alternatives.candidates[0].name == origin:
            found: dict[str, dict[str | None, float | None]] = {}
            for each in alternatives.candidates:
                found.setdefault(algorithm_of(each.name), {each.name: each.cycles})
                if tiles:
                    found[algorithm_of(each.name)][each.name] = each.cycles
            return {name: cycles for some in found.values() for name, cycles in some.items()}
    return {None: None}


def measure(
    layer: Layer, target: Target, frequency: float, rounds: int, caches: np.ndarray, tiles: bool
) -> list[Choice]:
    """Every choice's time; the runs of different choices take turns."""
    choices = choices_of(layer, target, tiles)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        candidates = [
            prepare(layer, name, target, Path(folder) / str(number))
            for number, name in enumerate(choices)
        ]
        for each in candidates:
            stack.enter_context(each.model)
        best = [math.inf] * len(candidates)
        for _ in range(rounds):
            for number, each in enumerate(candidates):
                caches.sum()
                seconds = profile_steps(each.model)[each.step].seconds
                best[number] = min(best[number], seconds)
    return [
        Choice(
            each.generator,
            each is candidates[0],
            each.flops,
            cycles / frequency if cycles else None,
            seconds,
        )
        for each, cycles, seconds in zip(candidates, choices.values(), best, strict=True)
    ]


def time_lost(results: Sequence[Sequence[Choice]]) -> float:
    """How much longer the choices made take than the best ones, all layers together."""
    made = sum(choice.measured for choices in results for choice in choices if choice.chosen)
    best = sum(min(choice.measured for choice in choices) for choices in results)
    return made / best - 1 if best else 0.0


def table(results: dict[str, list[Choice]], top: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "", "generator", "µs", "predicted", "GFLOP/s", "of peak",
                   "lost"):  # fmt: skip
        words = column in ("layer", "", "generator")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for layer, choices in results.items():
        best = min(choice.measured for choice in choices)
        for number, choice in enumerate(choices):
            speed = choice.flops / choice.measured / 1e9
            is_wrong = choice.chosen and choice.measured > best
            table.add_row(
                "" if number else layer,
                "→" if choice.chosen else "",
                choice.generator,
                f"{choice.measured * 1e6:.1f}",
                f"{choice.predicted * 1e6:.1f}" if choice.predicted else "",
                f"{speed:.1f}",
                f"{speed / top:.0%}",
                f"{choice.measured / best - 1:.1%}" if is_wrong else "",
            )
    return table


def model_layers(name: str) -> list[Layer]:
    """The distinct layers of a model, in order."""
    model = onnx_models.find(name)
    with torch.no_grad():
        graph = import_model(str(model.path), model.compile_inputs())
        run_passes(graph, resolve(None), Context())
    found = dict.fromkeys(layers_of(graph))
    if None in found:
        print(f"{name}: some layers are left out: batches, 1-D, 3-D, transposed", file=sys.stderr)
    return [layer for layer in found if layer]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("layers", nargs="*", metavar="LAYER", help="see `common_layers.py`")
    parser.add_argument("--model", action="append", help="take this model's layers; repeatable")
    parser.add_argument("--only", metavar="REGEX", default="", help="layers whose text matches")
    parser.add_argument("--rounds", type=int, default=20, help="runs of each choice")
    parser.add_argument("--tiles", action="store_true", help="also other register tiles")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures to a file too")
    options = parser.parse_args()
    given = [parse(text) for text in options.layers]
    try:
        given += [each for name in options.model or () for each in model_layers(name)]
    except GraphoptError as error:
        parser.error(str(error))
    layers = list(dict.fromkeys(given or [parse(text) for text in COMMON_LAYERS]))
    layers = [layer for layer in layers if re.search(options.only, str(layer))]
    if not layers:
        parser.error("no such layer")

    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    target = host()
    top = peak.measure()
    # Two vector multiply-adds a cycle, as the cost functions assume.
    frequency = top * 1e9 / (2 * target.isa.multiply_adds * target.isa.lanes())
    caches = np.zeros(CACHES // 8)
    progress = Console(stderr=True)
    results: dict[str, list[Choice]] = {}
    for number, layer in enumerate(layers, start=1):
        progress.print(f"{number}/{len(layers)} {layer}", highlight=False)
        results[str(layer)] = measure(
            layer, target, frequency, options.rounds, caches, options.tiles
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table(results, top))
    with_choice = [choices for choices in results.values() if len(choices) > 1]
    figures: dict[str, Any] = {
        "peak_gflops": top,
        "lost": time_lost(with_choice),
        "lost_of_all": time_lost(list(results.values())),
    }
    print(f"peak of one core: {top:.1f} GFLOP/s")
    print(
        f"lost by wrong choices: {figures['lost']:.1%} of the layers with a choice, "
        f"{figures['lost_of_all']:.1%} of all"
    )
    if options.json:
        rows = {layer: [asdict(each) for each in choices] for layer, choices in results.items()}
        options.json.write_text(json.dumps({**figures, "layers": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
