"""Peak resident memory of a fresh process that loads a model and runs it once.

What is resident of a mapped file depends on how the file came into the system's page cache: a Linux
6.18 maps as much around a page as the cache holds in one piece, up to 2 MB where a linker has just
written the file. So the model's file is taken out of the cache, and the process started twice: the
first one reads the file from storage, as after a boot, the second one finds what the first left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.contest import ROOT, Arrays
from bench.native import compile_program
from bench.peers import environment
from graphopt.runtime.devices import build_runner

MAXRSS = Path(__file__).with_name("maxrss.c")


class Peaks(NamedTuple):
    """Bytes that two processes took: one that read the model from storage, and the next."""

    first: int
    again: int


def c_process(folder: Path, inputs: Arrays) -> Peaks:
    """What a static C program with the library takes (`csrc/runner.c`), at one thread."""
    program = build_runner(folder)
    command = [str(program), "--threads", "1"]
    data = b"".join(array.tobytes() for array in inputs.values())
    return _peaks(program, lambda: _peak(command, data))


def python_process(runner: str, file: Path | None, source: str | Path, inputs: Arrays) -> Peaks:
    """What a Python with numpy and one system takes (see `runners.py`), at one thread.

    Args:
        runner: the system's name in `runners.py`.
        file: of the model; it leaves the page cache first.
        source: what the system loads.
        inputs: the arrays of the one run.
    """
    python = environment.python() if runner == "onnxruntime" else sys.executable
    with tempfile.TemporaryDirectory(prefix="graphopt-memory-") as folder:
        stored = Path(folder) / "inputs.npz"
        np.savez(stored, *inputs.values())
        request = {
            "runner": runner,
            "source": str(source),
            "inputs": str(stored),
            "names": list(inputs),
            "outputs": str(Path(folder) / "outputs.npz"),
            "threads": 1,
        }
        command = [str(python), "-m", "bench.worker"]
        data = json.dumps(request).encode() + b"\n"
        return _peaks(file, lambda: _peak(command, data))


def _peaks(file: Path | None, peak: Callable[[], int]) -> Peaks:
    if file:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())  # only what is on storage can leave the cache
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return Peaks(peak(), peak())


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
