"""How much flash and RAM does a compiled model take?

    python bench/memory.py [MODEL...] [--target cortex-a72] [--json]

RAM: the planned arena beside the largest sum of tensors that are alive at one step, which no plan
without working in place can beat. Flash: the library, and what is left of it without the weights.
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
from graphopt.backends.lower import live_bytes
from tests.models import zoo

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


def measure(name: str, target: str) -> dict[str, Any]:
    """Compile one model of the zoo and measure what came out."""
    entry = zoo.MODELS[name]
    fixed = entry.kind == "onnx" and not entry.dynamic
    inputs = None if fixed else entry.inputs()
    compiled = graphopt.compile(entry.model(), inputs, target=target, name=name)
    with tempfile.TemporaryDirectory() as folder:
        artifact = compiled.export(Path(folder) / "out")
        library = artifact.library.stat().st_size
        members = archive_members(artifact.archive)
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
        "runtime_object": sum(members[f"{name}_{part}.o"] for part in RUNTIME_MEMBERS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(zoo.MODELS))
    parser.add_argument("--target", default="host")
    parser.add_argument("--json", action="store_true", help="print one JSON value and no table")
    options = parser.parse_args()
    unknown = sorted(set(options.models) - set(zoo.MODELS))
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}")

    progress = Console(stderr=True)
    results = {}
    for name in options.models or zoo.MODELS:
        progress.print(f"{name}: building")
        results[name] = measure(name, options.target)
    if options.json:
        print(json.dumps({"target": options.target, "models": results}, indent=1))
        return
    table = Table(title=f"{options.target}, KB (1,024 bytes)")
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
    table.add_column("model")
    for title in columns.values():
        table.add_column(title, justify="right")
    for name, result in results.items():
        table.add_row(
            name,
            *(
                f"{result[key]:.3f}" if key == "ratio" else f"{result[key] / 1024:,.1f}"
                for key in columns
            ),
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()
