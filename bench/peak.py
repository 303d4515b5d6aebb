"""The most multiply-adds that one core can do, measured by a small C program (`peak.c`).

python bench/peak.py
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.native import compile_program, output_of

SOURCE = Path(__file__).with_name("peak.c")


def measure() -> float:
    """GFLOP/s of one core, a multiply-add counted as two; takes about a second.

    Raises:
        RuntimeError: gcc is missing, or failed.
    """
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="graphopt-peak-") as folder:
        return float(output_of([str(compile_program(SOURCE, Path(folder))), str(core)]))


if __name__ == "__main__":
    print(f"{measure():.1f} GFLOP/s a core")
