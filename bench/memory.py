"""How much flash and RAM does a compiled model take?

    python bench/memory.py [MODEL...] [--target cortex-a72] [--json]

RAM: the planned arena beside the largest sum of tensors that are alive at one step, which no plan
without working in place can beat. Flash: the library, and what is left of it without the weights.

For this machine also the peak resident memory of processes that load the model and run it once: a C
program with the library, Python with `graphopt.load`, Python with ONNX Runtime; of each, one whose
model file comes from storage, as after a boot, and one after it (see `resident.py`). There, a ratio
is what ONNX Runtime takes divided by what graphopt's C program takes: above 1, graphopt takes less.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table

import graphopt
from bench import onnx_models, resident
from bench.onnx_models import BenchModel
from graphopt.backends.lower import live_bytes
from graphopt.errors import GraphoptError
from graphopt.runtime.artifact import Artifact

RUNTIME_MEMBERS = ("runtime", "pool", "cpu")


def archive_members(path: Path) -> dict[str, int]:
    """Size of each member of a static library (System V `ar`, with GNU's table of long names)."""
    data = path.read_bytes()
    assert data.startswith(b"!<arch>\n")
    members: dict[str, int] = {}
    long_names = b""
    position = 8
    while position < len(data):
        header = data[position : position + 60]
        name, size = header[:16].decode().rstrip(), int(header[48:58])
        body = data[position + 60 : position + 60 + size]
        if name == "//":
            long_names = body
        elif name != "/":
            if name.startswith("/"):
                name = long_names[int(name[1:]) :].split(b"\n")[0].decode()
            members[name.rstrip("/")] = size
        position += 60 + size + size % 2
    return members


def measure(model: BenchModel, target: str) -> dict[str, Any]:
    """Compile one model and measure what came out."""
    compiled = graphopt.compile(model.path, model.compile_inputs(), target=target, name=model.name)
    with tempfile.TemporaryDirectory() as folder:
        artifact = compiled.export(Path(folder) / "out")
        library = artifact.library.stat().st_size
        members = archive_members(artifact.archive)
        peaks = resident_memory(model, artifact) if target == "host" else {}
    program = compiled.program
    live = live_bytes(program)
    return {
        "arena": program.arena,
        "live": live,
        "ratio": program.arena / live if live else 1.0,
        "scratch_per_thread": program.scratch,
        "weights": program.weights,
        "library": library,
        "library_without_weights": library - program.weights,
        "runtime_object": sum(members[f"{model.name}_{part}.o"] for part in RUNTIME_MEMBERS),
        "resident": peaks,
    }


def resident_memory(model: BenchModel, artifact: Artifact) -> dict[str, Any]:
    """Peak resident bytes of the processes, and ONNX Runtime's relative to graphopt's C program."""
    in_c = resident.c_process(artifact.folder, model.inputs)
    in_python = resident.python_process("graphopt", artifact.library, artifact.folder, model.inputs)
    theirs = resident.python_process("onnxruntime", model.path, model.path, model.inputs)
    return {
        state: {
            "graphopt_c": getattr(in_c, state),
            "graphopt_python": getattr(in_python, state),
            "onnxruntime_python": getattr(theirs, state),
            "ratio": getattr(theirs, state) / getattr(in_c, state),
        }
        for state in resident.Peaks._fields
    }


def plan_table(results: dict[str, Any], target: str) -> Table:
    """What the compiler planned and built."""
    columns = {
        "arena": "arena",
        "live": "largest live sum",
        "ratio": "ratio",
        "scratch_per_thread": "scratch per thread",
        "weights": "weights",
        "library": "library",
        "library_without_weights": "without weights",
        "runtime_object": "runtime object",
    }
    table = Table("model", title=f"{target}, KB (1,024 bytes)")
    for title in columns.values():
        table.add_column(title, justify="right")
    for name, result in results.items():
        figures = (
            f"{result[key]:.3f}" if key == "ratio" else f"{result[key] / 1024:,.1f}"
            for key in columns
        )
        table.add_row(name, *figures)
    return table


def resident_table(results: dict[str, Any], python: int) -> Table:
    """What processes took."""
    columns = {
        "graphopt_c": "graphopt, C",
        "graphopt_python": "graphopt, Python",
        "onnxruntime_python": "ONNX Runtime, Python",
        "ratio": "ratio to C",
    }
    table = Table("model", title="peak resident memory of a process, MB (1,048,576 bytes)")
    for title in columns.values():
        for state in resident.Peaks._fields:
            table.add_column(f"{title}, {state}", justify="right")
    for name, result in results.items():
        peaks = result["resident"]
        figures = (
            f"{peaks[state][key]:.2f}" if key == "ratio" else f"{peaks[state][key] / 2**20:,.1f}"
            for key in columns
            for state in resident.Peaks._fields
        )
        table.add_row(name, *figures)
    table.caption = (
        f"Python with numpy alone: {python / 2**20:.1f} MB. A ratio above 1: graphopt takes less. "
        "First: the model's file comes from storage; again: it is in the page cache."
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        default=list(onnx_models.NAMES),
        help=f"an .onnx file with fixed shapes, or: {', '.join(onnx_models.NAMES)}",
    )
    parser.add_argument("--target", default="host")
    parser.add_argument("--json", action="store_true", help="print one JSON value and no table")
    options = parser.parse_args()

    progress = Console(stderr=True)
    report: dict[str, Any] = {"target": options.target, "models": {}}
    try:
        if options.target == "host":
            report["python_alone"] = resident.python_process("nothing", None, "", {}).again
        for model in [onnx_models.find(name) for name in options.models]:
            progress.print(f"{model.name}: building")
            report["models"][model.name] = measure(model, options.target)
    except (GraphoptError, RuntimeError) as error:
        raise SystemExit(f"error: {error}") from None
    if options.json:
        print(json.dumps(report, indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(plan_table(report["models"], options.target))
    if options.target == "host":
        console.print(resident_table(report["models"], report["python_alone"]))


if __name__ == "__main__":
    main()
