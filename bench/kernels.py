"""How fast is each layer's kernel, and was it the right one? One layer at a time, every choice.

    python bench/kernels.py                        # the layers of nine common networks
    python bench/kernels.py --only "k3 p1$"        # those whose text matches
    python bench/kernels.py --model mobilenet_v2   # a model's own: a name or an .onnx file
    python bench/kernels.py "conv 16x56x56 32 k3 p1" "linear 128x384 1536"

A layer runs as inside a network, its input just written and its weights long out of the caches, on
one core, the choices in turn; the best of many runs counts. GFLOP/s are of the operations that the
kernel itself does (Winograd's products are fewer than the layer's), beside the peak of the core.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import onnx_models, peak
from bench.common_layers import COMMON_LAYERS
from bench.layers import Layer, build, layers_of, parse
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.kernels import GENERATORS, conv_deep, conv_direct, winograd_plan
from graphopt.backends.kernels.conv import lower_direct, lower_winograd
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, host
from graphopt.errors import GraphoptError
from graphopt.importers import import_model
from graphopt.passes.base import Context
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import LoadedModel, load
from graphopt.runtime.profile import profile_steps

DIRECT, DEEP = "direct", "deep"
WINOGRAD = {f"F({m})": m for m in (2, 4)}
_NAMES = {"conv_direct": DIRECT, "gemm": DIRECT, "conv_deep": DEEP, "gemm_deep": DEEP}
CACHES = 64 << 20
"""Bytes to read for the weights to leave the caches."""


@dataclass(frozen=True)
class Choice:
    """One way to compute a layer.

    Attributes:
        name: `direct`, `deep`, `F(2)`, `F(4)`, or the generator of what is no plain convolution.
        generator: the generator and its configuration.
        chosen: whether graphopt takes this one.
        flops: operations the kernel does.
        predicted: seconds by the cost functions that chose, None where there are none.
        measured: seconds.
    """

    name: str
    generator: str
    chosen: bool
    flops: int
    predicted: float | None
    measured: float


@dataclass(frozen=True)
class Candidate:
    """A choice that is built and waits to be measured; `step` is the layer's in the model."""

    name: str
    generator: str
    flops: int
    cycles: float | None
    model: LoadedModel
    step: int


@contextmanager
def forced(name: str) -> Iterator[None]:
    """While it lasts, products and convolutions are lowered this way, whatever is estimated."""
    with ExitStack() as stack:
        if name == DIRECT:
            stack.enter_context(patch.dict(GENERATORS, convolution=(lower_direct,)))
            stack.enter_context(patch.object(conv_deep, "plan", lambda *_: None))
        elif name == DEEP:
            stack.enter_context(patch.dict(GENERATORS, convolution=(lower_direct,)))
            stack.enter_context(patch.object(conv_direct, "cost", lambda *_: math.inf))
        elif name in WINOGRAD:
            m = WINOGRAD[name]
            # What is beside the layer is no 3×3 convolution: Winograd refuses it.
            generators = (lower_winograd, lower_direct)
            stack.enter_context(patch.dict(GENERATORS, convolution=generators))
            points = winograd_plan._POINTS
            stack.enter_context(patch.dict(points, {m: points[m]}, clear=True))
            stack.enter_context(patch.object(winograd_plan, "direct_cost", lambda *_: math.inf))
        yield


def choices_of(layer: Layer, target: Target) -> Sequence[str]:
    """The names of the ways there are; one empty name where it is no plain convolution."""
    spec = layer.conv_spec
    if spec is None or spec.groups > 1:
        return ("",)
    is_deep = conv_deep.plan(spec, target.isa, target.l2_bytes) is not None
    has_winograd = layer.op == "conv" and winograd_plan.supports(spec)
    return (DIRECT, *([DEEP] if is_deep else []), *(WINOGRAD if has_winograd else []))


def name_of(generator: str) -> str:
    """The choice that a generator's description is."""
    winograd = re.match(r"winograd F\((\d)", generator)
    if winograd:
        return f"F({winograd[1]})"
    kind = generator.split()[0]
    return _NAMES.get(kind, kind)


def cycles_of(layer: Layer, name: str, target: Target) -> float | None:
    """What the cost functions think that the layer takes."""
    spec = layer.conv_spec
    if spec is None or spec.groups > 1:
        return None
    isa, l2_bytes = target.isa, target.l2_bytes
    if name in WINOGRAD:
        return winograd_plan.cost(winograd_plan.plan(spec, isa, l2_bytes), isa, l2_bytes)
    if name == DEEP:
        deep = conv_deep.plan(spec, isa, l2_bytes)
        return None if deep is None else conv_deep.cost(deep, isa)
    if layer.op == "conv" and winograd_plan.supports(spec):
        # This is what Winograd's estimate is held against.
        return winograd_plan.direct_cost(spec, isa, l2_bytes)
    return conv_direct.cost(conv_direct.plan(spec, isa, l2_bytes), isa)


def own_flops(layer: Layer, name: str, flops: int) -> int:
    """Operations of the kernel: Winograd's are those of its products."""
    spec = layer.conv_spec
    if name not in WINOGRAD or spec is None:
        return flops
    m = WINOGRAD[name]
    tiles = math.prod(-(-size // m) for size in spec.out_size)
    return 2 * tiles * (m + winograd_plan.KERNEL - 1) ** 2 * spec.icg * spec.ocg


def prepare(layer: Layer, name: str, target: Target, folder: Path) -> Candidate:
    """Build a layer one way."""
    graph, op = build(layer)
    with torch.no_grad(), forced(name):
        program = lower(graph, target, "layer")
        cycles = cycles_of(layer, name, target)
    steps = [number for number, step in enumerate(program.steps) if op in step.ops]
    # A convolution stands between two others, unless it is a network's first.
    step = steps[-2] if layer.op == "conv" else steps[0]
    artifact = build_artifact(program, target, compile_kernels(program, target), folder)
    generator = program.steps[step].kernel.origin
    flops = own_flops(layer, name, program.steps[step].flops)
    model = load(artifact.folder, 1)
    return Candidate(name or name_of(generator), generator, flops, cycles, model, step)


def chosen_name(layer: Layer, target: Target) -> str:
    """The choice that graphopt makes."""
    graph, op = build(layer)
    with torch.no_grad():
        steps = [step for step in lower(graph, target, "layer").steps if op in step.ops]
    return name_of((steps[-2] if layer.op == "conv" else steps[0]).kernel.origin)


def measure(
    layer: Layer, target: Target, frequency: float, rounds: int, caches: np.ndarray
) -> list[Choice]:
    """Every choice's time; the runs of different choices take turns."""
    made = chosen_name(layer, target)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        candidates = [
            prepare(layer, name, target, Path(folder) / str(number))
            for number, name in enumerate(choices_of(layer, target))
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
            each.name,
            each.generator,
            each.name == made,
            each.flops,
            each.cycles / frequency if each.cycles else None,
            seconds,
        )
        for each, seconds in zip(candidates, best, strict=True)
    ]


def time_lost(results: Sequence[Sequence[Choice]]) -> float:
    """How much longer the choices made take than the best ones, all layers together."""
    made = sum(choice.measured for choices in results for choice in choices if choice.chosen)
    best = sum(min(choice.measured for choice in choices) for choices in results)
    return made / best - 1 if best else 0.0


def table(results: dict[str, list[Choice]], top: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "", "choice", "generator", "µs", "predicted", "GFLOP/s", "of peak",
                   "lost"):  # fmt: skip
        words = column in ("layer", "", "choice", "generator")
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    for layer, choices in results.items():
        best = min(choice.measured for choice in choices)
        for number, choice in enumerate(choices):
            speed = choice.flops / choice.measured / 1e9
            is_wrong = choice.chosen and choice.measured > best
            table.add_row(
                "" if number else layer,
                "→" if choice.chosen else "",
                choice.name,
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
    frequency = top * 1e9 / (4 * target.isa.lanes())
    caches = np.zeros(CACHES // 8)
    progress = Console(stderr=True)
    results: dict[str, list[Choice]] = {}
    for number, layer in enumerate(layers, start=1):
        progress.print(f"{number}/{len(layers)} {layer}", highlight=False)
        results[str(layer)] = measure(layer, target, frequency, options.rounds, caches)
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
