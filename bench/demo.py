"""A real model, from PyTorch to a library for a Raspberry Pi, with proof that it still works.

    python bench/demo.py

Compiles MobileNetV2 with its ImageNet weights for this machine and for a Raspberry Pi 4, lets
both and PyTorch classify 20 photos (the Pi's library runs under an emulator), and times it here
beside PyTorch and ONNX Runtime. The libraries stay in `demo-out/`.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import graphopt
from bench.contest import ROOT, Contestant, all_times, contest
from bench.onnx_models import export
from graphopt.runtime.artifact import Artifact
from tests.models import wheels, zoo

NAME = "mobilenet_v2"
OUT = ROOT / "demo-out"
TARGETS = ("host", "rpi4")

# Only for the names of the 1,000 classes, which it carries as text.
TIMM = wheels.Wheel(
    "timm", "1.0.22", "888981753e65cbaacfc07494370138b1700a27b1f0af587f4f9b47bc024161d0"
)

C_SNIPPET = """\
#include "mobilenet_v2.h"

mobilenet_v2_context *model;
if (mobilenet_v2_create(&model, NULL) != MOBILENET_V2_OK) puts(mobilenet_v2_last_error(NULL));
const mobilenet_v2_input inputs[] = {{image, sizeof image}};      /* float image[3 * 224 * 224] */
const mobilenet_v2_output outputs[] = {{logits, sizeof logits}};  /* float logits[1000] */
mobilenet_v2_run(model, inputs, 1, outputs, 1);
mobilenet_v2_destroy(model);"""

PYTHON_SNIPPET = """\
from mobilenet_v2 import Model
logits = Model(threads=4)(image)  # numpy float32, 1×3×224×224"""


@dataclass(frozen=True)
class Build:
    """One target's library and what it took to make it."""

    target: str
    artifact: Artifact
    seconds: float
    arena: int


def build(target: str, console: Console) -> Build:
    entry = zoo.MODELS[NAME]
    with console.status(f"compiling {NAME} for {target}") as status:
        begin = time.perf_counter()
        compiled = graphopt.compile(
            entry.model(),
            entry.inputs(),
            target=target,
            name=NAME,
            progress=lambda stage: status.update(f"compiling {NAME} for {target}: {stage}"),
        )
        artifact = compiled.export(OUT / target)
        seconds = time.perf_counter() - begin
    console.print(f"compiled {NAME} for {target} in {seconds:.1f} s")
    return Build(target, artifact, seconds, compiled.program.arena)


def class_names() -> list[str]:
    """The first common name of each ImageNet class; its number where the names cannot be had."""
    try:
        synsets = wheels.read(TIMM, "timm/data/_info/imagenet_synsets.txt").decode().split()
        lemmas = wheels.read(TIMM, "timm/data/_info/imagenet_synset_to_lemma.txt").decode()
    except RuntimeError:  # No network: the demo is about the numbers anyway.
        return [f"class {number}" for number in range(1000)]
    names = dict(line.split("\t", 1) for line in lemmas.splitlines())
    return [names[synset].split(",")[0].strip() for synset in synsets]


def classify(builds: list[Build], console: Console) -> None:
    """Top-1 of every photo by PyTorch and by each build, as a table."""
    photos = zoo.imagenet_photos()
    images = [zoo.preprocess_mobilenet_v2(photo.pixels) for photo in photos]
    names = class_names()
    module = zoo.MODELS[NAME].model()
    with torch.inference_mode():
        expected = [module(torch.from_numpy(image)).numpy()[0] for image in images]
    results = {}
    for build in builds:
        with graphopt.load(build.artifact.folder) as model:
            # Emulated runs are programs of their own, so they can share out the cores.
            workers = len(os.sched_getaffinity(0))
            slow = "" if build.target == "host" else ", under an emulator: some seconds each"
            console.print(f"classifying {len(images)} photos for {build.target}{slow}")
            with (
                console.status(f"classifying with the library for {build.target}"),
                ThreadPoolExecutor(workers) as pool,
            ):
                results[build.target] = [logits[0] for logits in pool.map(model, images)]

    table = Table(title=f"{NAME}: best of 1,000 classes")
    columns = ("photo", "label", "PyTorch", *(b.target for b in builds), "same", "max |error|")
    for column in columns:
        table.add_column(column)
    worst = 0.0
    agree = 0
    for index, photo in enumerate(photos):
        reference = expected[index]
        outputs = [reference, *(results[b.target][index] for b in builds)]
        best = [int(logits.argmax()) for logits in outputs]
        largest = np.abs(reference).max()
        error = max(float(np.abs(o - reference).max() / largest) for o in outputs[1:])
        worst = max(worst, error)
        same = len(set(best)) == 1
        agree += same
        table.add_row(
            photo.name.removeprefix("imagenet_"),
            names[photo.label],
            *(f"[{'green' if each == photo.label else 'red'}]{names[each]}" for each in best),
            "yes" if same else "[red]no",
            f"{error:.1e}",
        )
    console.print(table)
    right = {
        "PyTorch": sum(int(e.argmax()) == p.label for e, p in zip(expected, photos, strict=True)),
        **{
            target: sum(int(r.argmax()) == p.label for r, p in zip(rows, photos, strict=True))
            for target, rows in results.items()
        },
    }
    console.print(
        f"{agree} of {len(photos)} photos get the same class from all; right: "
        + ", ".join(f"{who} {count}" for who, count in right.items())
        + f"; largest error {worst:.1e} of the largest output"
    )


def race(host: Build, console: Console) -> None:
    """Latency on this machine beside PyTorch and ONNX Runtime."""
    entry = zoo.MODELS[NAME]
    contestants = [
        Contestant("graphopt", "graphopt", str(host.artifact.folder)),
        Contestant("ONNX Runtime", "onnxruntime", str(export(entry))),
        Contestant("PyTorch", "torch_eager", NAME),
    ]
    cores = len(os.sched_getaffinity(0))
    table = Table(title="latency on this machine, batch 1, ms: minimum (median)")
    table.add_column("threads", justify="right")
    for contestant in contestants:
        table.add_column(contestant.label, justify="right")
    for threads in sorted({1, min(2, cores)}):
        with console.status(f"timing at {threads} thread(s)"):
            times = all_times(contest(contestants, entry.inputs(), threads=threads))
        table.add_row(
            str(threads),
            *(f"{t.best * 1e3:.2f} ({t.median * 1e3:.2f})" for t in times.values()),
        )
    console.print(table)


def sizes(builds: list[Build], console: Console) -> None:
    table = Table(title="the libraries")
    for column in ("target", "library", "of it weights", "arena", "build time"):
        table.add_column(column, justify="left" if column == "target" else "right")
    for build in builds:
        weights = build.artifact.manifest["memory"]["weights"]
        table.add_row(
            build.target,
            f"{build.artifact.library.stat().st_size / 1e6:.2f} MB",
            f"{weights / 1e6:.2f} MB",
            f"{build.arena / 1e6:.2f} MB",
            f"{build.seconds:.1f} s",
        )
    console.print(table)


def farewell(board: Build, console: Console) -> None:
    """What was made, and how to use it."""
    folder = board.artifact.folder.relative_to(ROOT)
    console.print(f"\n[bold]The library for a Raspberry Pi 4 is in {folder}/:[/bold]")
    for path in sorted(board.artifact.folder.iterdir()):
        console.print(f"  {path.name}  ({path.stat().st_size:,} bytes)")
    console.print("\n[bold]Copy it to the board:[/bold]")
    print(f"  scp -r {folder} pi@raspberrypi:mobilenet")
    console.print("\n[bold]From Python there (only numpy is needed), inside the folder:[/bold]")
    print("  " + PYTHON_SNIPPET.replace("\n", "\n  "))
    console.print(
        "\n[bold]From C[/bold] (cc app.c -Imobilenet -Lmobilenet -lmobilenet_v2"
        " -Wl,-rpath,'$ORIGIN/mobilenet'; docs/artifact.md has a whole program):"
    )
    print("  " + C_SNIPPET.replace("\n", "\n  "))


def main() -> None:
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    builds = [build(target, console) for target in TARGETS]
    classify(builds, console)
    race(builds[0], console)
    sizes(builds, console)
    farewell(builds[1], console)


if __name__ == "__main__":
    main()
