"""How fast is a compiled model? graphopt beside ONNX Runtime, on the same ONNX files, in turn.

    python bench/latency.py                          # every model, at 1 thread and on all cores
    python bench/latency.py mobilenet_v2 --threads 1 --json

Ratios under 1 mean that graphopt is faster. Of the two figures of a run, the minimum says what the
code can do, the median what it did on this machine on this day.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

import graphopt
from bench import onnx_models
from bench.contest import OUT, Contestant, contest, graphopt_runner, onnxruntime_runner
from tests.models import zoo


def build(name: str) -> dict[str, Any]:
    """Compile the ONNX file for this machine; what it took and how big it is."""
    path = onnx_models.onnx_file(name)
    begin = time.perf_counter()
    compiled = graphopt.compile(path, onnx_models.compile_inputs(name), name=name)
    artifact = compiled.export(OUT / name)
    return {
        "folder": str(artifact.folder),
        "build_seconds": time.perf_counter() - begin,
        "library_bytes": artifact.library.stat().st_size,
        "arena_bytes": compiled.program.arena,
    }


def measure(name: str, folder: str, threads: int, seconds: float) -> dict[str, Any]:
    """Both runtimes' times at one number of threads, and graphopt's relative to the other's."""
    path = str(onnx_models.onnx_file(name))
    times = contest(
        [
            Contestant("graphopt", graphopt_runner, folder),
            Contestant("onnxruntime", onnxruntime_runner, path),
        ],
        zoo.MODELS[name].inputs(),
        threads=threads,
        seconds=seconds,
    )
    ours, theirs = times["graphopt"], times["onnxruntime"]
    return {
        "graphopt": ours.as_dict(),
        "onnxruntime": theirs.as_dict(),
        "ratio_min": ours.best / theirs.best,
        "ratio_median": ours.median / theirs.median,
    }


def table(results: dict[str, Any], threads: int) -> Table:
    """One number of threads as a table for people."""
    table = Table(title=f"{threads} thread{'s' if threads > 1 else ''}, batch 1, ms")
    for column in ("model", "graphopt min", "median", "onnxruntime min", "median",
                   "ratio min", "median", "arena KB", "library KB", "build s"):  # fmt: skip
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, result in results.items():
        times = result["threads"][str(threads)]
        figures = [
            times[runtime][key]
            for runtime in ("graphopt", "onnxruntime")
            for key in ("min_ms", "median_ms")
        ]
        table.add_row(
            name,
            *(f"{figure:.2f}" for figure in figures),
            *(f"{times[key]:.2f}" for key in ("ratio_min", "ratio_median")),
            f"{result['arena_bytes'] / 1024:,.0f}",
            f"{result['library_bytes'] / 1024:,.0f}",
            f"{result['build_seconds']:.1f}",
        )
    means = geometric_means(results, threads)
    table.add_section()
    table.add_row("geometric mean", *[""] * 4, *(f"{mean:.2f}" for mean in means.values()))
    return table


def geometric_means(results: dict[str, Any], threads: int) -> dict[str, float]:
    return {
        key: statistics.geometric_mean(
            result["threads"][str(threads)][key] for result in results.values()
        )
        for key in ("ratio_min", "ratio_median")
    }


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(onnx_models.NAMES))
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and all cores")
    parser.add_argument("--seconds", type=float, default=2.0, help="running time per figure")
    parser.add_argument("--json", action="store_true", help="print one JSON value and no tables")
    options = parser.parse_args()
    names = options.models or onnx_models.NAMES
    unknown = sorted(set(names) - set(onnx_models.NAMES))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")
    all_threads = options.threads or sorted({1, cores})
    if max(all_threads) > cores:
        parser.error(f"this machine has {cores} cores")

    progress = Console(stderr=True)
    results: dict[str, Any] = {}
    for name in names:
        progress.print(f"{name}: building")
        result = build(name)
        result["threads"] = {}
        for threads in all_threads:
            progress.print(f"{name}: timing at {threads} thread(s)")
            result["threads"][str(threads)] = measure(
                name, result["folder"], threads, options.seconds
            )
        results[name] = result
    if options.json:
        means = {str(t): geometric_means(results, t) for t in all_threads}
        print(json.dumps({"models": results, "geometric_mean": means}, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    for threads in all_threads:
        console.print(table(results, threads))


if __name__ == "__main__":
    main()
