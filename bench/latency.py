"""How fast is a compiled model? graphopt beside five peers, on the same ONNX files, in turn.

    make peers                                       # once: installs the peers, exports the models
    python bench/latency.py                          # nine models, at 1 thread and on all cores
    python bench/latency.py resnet18 my.onnx --threads 1 --peers onnxruntime,mnn
    python bench/latency.py --json out.json --plot out.png

A ratio is the fastest peer's time divided by graphopt's: above 1, graphopt is faster than all of
them. Of the two figures of a run, the minimum says what the code can do, the median what it did on
this machine on this day. GFLOP/s count the operations of the direct algorithms (a multiply-add is
two), whatever the kernels do instead; the peak is that of `peak.c`, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from rich.console import Console
from rich.table import Table

import graphopt
from bench import onnx_models, peak, plot
from bench.contest import OUT, Contestant, Failure, Times, contest
from bench.onnx_models import BenchModel
from bench.peers import convert, environment
from graphopt.errors import GraphoptError

PEERS = ("onnxruntime", "openvino", "mnn", "ncnn", "torch_compile")
"""Each has a runner of this name in `runners.py`."""

OUTPUT_TOLERANCE = 1e-3
"""Largest difference from graphopt's outputs, relative to the largest, that is passed over in
silence: float32 in another order stays far below it; coarse Winograd may not, nor wrong answers."""


def build(model: BenchModel) -> dict[str, Any]:
    """Compile the ONNX file for this machine; what it took and how big it is."""
    begin = time.perf_counter()
    compiled = graphopt.compile(model.path, model.compile_inputs(), name=model.name)
    artifact = compiled.export(OUT / model.name)
    return {
        "folder": str(artifact.folder),
        "build_seconds": time.perf_counter() - begin,
        "library_bytes": artifact.library.stat().st_size,
        "arena_bytes": compiled.program.arena,
        "flops": sum(step["flops"] for step in artifact.manifest["steps"]),
    }


def source(peer: str, model: BenchModel) -> str:
    """What the peer's runner loads.

    Raises:
        ConversionError: there is nothing of this model that the peer can read.
    """
    if peer == "mnn":
        return str(convert.mnn_file(model))
    if peer == "ncnn":
        return str(convert.ncnn_file(model))
    if peer == "torch_compile":
        if not model.exported:
            raise convert.ConversionError("no PyTorch module of this model, only an ONNX file")
        return model.name
    return str(model.path)


def measure(
    model: BenchModel, folder: str, threads: int, seconds: float, peers: Sequence[str]
) -> dict[str, Any]:
    """All systems' times at one number of threads, and who failed or disagreed."""
    python = str(environment.python())
    contestants = [Contestant("graphopt", "graphopt", folder)]
    outcomes: dict[str, Times | Failure] = {}
    for peer in peers:
        try:
            contestants.append(Contestant(peer, peer, source(peer, model), python))
        except convert.ConversionError as error:
            outcomes[peer] = Failure(str(error))
    outcomes |= contest(contestants, model.inputs, threads=threads, seconds=seconds)
    ours = outcomes["graphopt"]
    if isinstance(ours, Failure):
        raise RuntimeError(f"{model.name}: graphopt: {ours.reason}")
    for label, each in outcomes.items():
        if isinstance(each, Times) and _sizes(each.outputs) != _sizes(ours.outputs):
            # It did something else, maybe nothing, and its time says nothing.
            outcomes[label] = Failure(f"its outputs have other sizes: {_sizes(each.outputs)}")
    times = {label: each for label, each in outcomes.items() if isinstance(each, Times)}
    return {
        "times": {label: each.as_dict() for label, each in times.items()},
        "failures": {
            label: each.reason for label, each in outcomes.items() if isinstance(each, Failure)
        },
        "output_errors": {
            label: output_error(each.outputs, ours.outputs)
            for label, each in times.items()
            if label != "graphopt"
        },
    }


def _sizes(outputs: Sequence[np.ndarray]) -> list[int]:
    return [each.size for each in outputs]


def output_error(outputs: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """The largest difference, relative to the reference's largest; infinite if NaN is among it."""
    errors = [
        float(np.abs(each.reshape(wanted.shape) - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        for each, wanted in zip(outputs, reference, strict=True)
    ]
    return float("inf") if np.isnan(errors).any() else max(errors)


def compare(result: dict[str, Any], flops: int, peak_gflops: float) -> dict[str, Any]:
    """The fastest peer, graphopt's ratio to it, and graphopt's share of the peak."""
    times = result["times"]
    gflops = flops / times["graphopt"]["min_ms"] / 1e6
    compared = {"gflops": gflops, "of_peak": gflops / peak_gflops}
    peers = [label for label in times if label != "graphopt"]
    if peers:
        for figure in ("min", "median"):
            key = f"{figure}_ms"
            fastest = min(peers, key=lambda label: times[label][key])
            compared[f"fastest_{figure}"] = fastest
            compared[f"ratio_{figure}"] = times[fastest][key] / times["graphopt"][key]
    return compared


def geometric_means(results: dict[str, Any], threads: int) -> dict[str, float]:
    """Of the ratios to the fastest peer, and to each peer (over the models that it runs)."""
    runs = [result["threads"][str(threads)] for result in results.values()]
    ratios: dict[str, list[float]] = {}
    for run in runs:
        ours = run["times"]["graphopt"]["min_ms"]
        for label, times in run["times"].items():
            ratios.setdefault(label, []).append(times["min_ms"] / ours)
        for key in ("ratio_min", "ratio_median"):
            if key in run:
                ratios.setdefault(key, []).append(run[key])
    return {label: statistics.geometric_mean(each) for label, each in ratios.items()}


def table(report: dict[str, Any], threads: int) -> Table:
    """One number of threads as a table for people."""
    results = report["models"]
    peers = report["peers"]
    title = f"{threads} thread{'s' if threads > 1 else ''}, batch 1: minimum in ms"
    table = Table(title=title)
    table.add_column("model")
    columns = ("graphopt", *peers, "fastest peer", "ratio", "of medians", "GFLOP/s", "of peak",
               "build s")  # fmt: skip
    for column in columns:
        table.add_column(column, justify="right")
    for name, result in results.items():
        run = result["threads"][str(threads)]
        table.add_row(
            name,
            *(
                f"{run['times'][label]['min_ms']:.2f}" if label in run["times"] else "failed"
                for label in ("graphopt", *peers)
            ),
            run.get("fastest_min", ""),
            *(f"{run[key]:.2f}" if key in run else "" for key in ("ratio_min", "ratio_median")),
            f"{run['gflops']:.1f}",
            f"{run['of_peak']:.2f}",
            f"{result['build_seconds']:.1f}",
        )
    means = report["geometric_mean"][str(threads)]
    table.add_section()
    table.add_row(
        "geometric mean",
        "",
        *(f"×{means[label]:.2f}" if label in means else "" for label in peers),
        "",
        *(f"{means[key]:.2f}" if key in means else "" for key in ("ratio_min", "ratio_median")),
    )
    return table


def remarks(report: dict[str, Any], threads: int) -> list[str]:
    """Who could not run what, and whose answers differ."""
    lines = []
    for name, result in report["models"].items():
        run = result["threads"][str(threads)]
        lines += [f"{name}: {label} failed: {why}" for label, why in run["failures"].items()]
        lines += [
            f"{name}: {label}'s outputs differ from graphopt's by {error:.1e} of the largest"
            for label, error in run["output_errors"].items()
            if error > OUTPUT_TOLERANCE
        ]
    return lines


def show(report: dict[str, Any]) -> None:
    """Print the tables with what has to be said about them."""
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    for threads in report["all_threads"]:
        console.print(table(report, threads))
        for line in remarks(report, threads):
            console.print(line, markup=False)
    console.print(
        "ratio: the fastest peer's time / graphopt's, above 1 graphopt is faster; in the last row "
        f"each peer's time / graphopt's. Peak: {report['peak_gflops_per_core']:.1f} GFLOP/s a core."
    )


def parse() -> argparse.Namespace:
    """The command line, checked."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=list(onnx_models.EXPORTED),
        help=f"an .onnx file with fixed shapes, or: {', '.join(onnx_models.NAMES)}",
    )
    parser.add_argument("--threads", type=int, action="append", help="default: 1, and all cores")
    parser.add_argument("--seconds", type=float, default=2.0, help="running time per figure")
    parser.add_argument("--peers", default=",".join(PEERS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save all figures")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them (.png, .svg)")
    options = parser.parse_args()
    options.threads = options.threads or sorted({1, cores})
    if not 1 <= min(options.threads) <= max(options.threads) <= cores:
        parser.error(f"this machine has {cores} cores")
    options.peers = options.peers.split(",")
    unknown = sorted(set(options.peers) - set(PEERS))
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Build and measure every model; the report is saved after each."""
    progress = Console(stderr=True)
    environment.python()  # Before anything takes its time: are the peers there?
    models = [onnx_models.find(name) for name in options.models]
    report: dict[str, Any] = {
        "peers": options.peers,
        "all_threads": options.threads,
        "peak_gflops_per_core": peak.measure(),
        "models": {},
    }
    for model in models:
        progress.print(f"{model.name}: building")
        result = build(model)
        result["threads"] = {}
        for threads in options.threads:
            progress.print(f"{model.name}: timing at {threads} thread(s)")
            figures = measure(model, result["folder"], threads, options.seconds, options.peers)
            peak_gflops = threads * report["peak_gflops_per_core"]
            result["threads"][str(threads)] = figures | compare(
                figures, result["flops"], peak_gflops
            )
        report["models"][model.name] = result
        report["geometric_mean"] = {
            str(threads): geometric_means(report["models"], threads) for threads in options.threads
        }
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    return report


def main() -> None:
    options = parse()
    try:
        report = run(options)
    except (GraphoptError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    show(report)
    if options.plot:
        plot.draw(report, options.plot)


if __name__ == "__main__":
    main()
