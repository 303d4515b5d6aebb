"""Peak resident memory of a fresh process that loads a model and runs it once."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench.contest import ROOT, Arrays
from bench.native import compile_program
from bench.peers import environment
from graphopt.runtime.devices import build_runner

MAXRSS = Path(__file__).with_name("maxrss.c")


def c_process(folder: str, inputs: Arrays) -> int:
    """Bytes that a static C program with the library takes (`csrc/runner.c`), at one thread."""
    command = [str(build_runner(folder)), "--threads", "1"]
    return _peak(command, b"".join(array.tobytes() for array in inputs.values()))


def python_process(runner: str, source: str, inputs: Arrays) -> int:
    """Bytes that a Python with numpy and one system takes (see `runners.py`), at one thread."""
    python = environment.python() if runner == "onnxruntime" else sys.executable
    with tempfile.TemporaryDirectory(prefix="graphopt-memory-") as folder:
        stored = Path(folder) / "inputs.npz"
        np.savez(stored, *inputs.values())
        request = {
            "runner": runner,
            "source": source,
            "inputs": str(stored),
            "names": list(inputs),
            "outputs": str(Path(folder) / "outputs.npz"),
            "threads": 1,
        }
        command = [str(python), "-m", "bench.worker"]
        return _peak(command, json.dumps(request).encode() + b"\n")


def _peak(command: Sequence[str], data: bytes) -> int:
    with tempfile.TemporaryDirectory(prefix="graphopt-memory-") as folder:
        program = compile_program(MAXRSS, Path(folder))
        figure = Path(folder) / "bytes"
        done = subprocess.run(
            [str(program), str(figure), *command],
            cwd=ROOT,
            input=data,
            capture_output=True,
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr + done.stdout).decode(errors="replace").strip()
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[-500:]}")
        return int(figure.read_text())
