"""The most multiply-adds that one core can do, measured by a small C program (`peak.c`).

python bench/peak.py
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("peak.c")


def measure() -> float:
    """GFLOP/s of one core, a multiply-add counted as two; takes about a second.

    Raises:
        RuntimeError: gcc is missing, or failed.
    """
    core = min(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="graphopt-peak-") as folder:
        program = Path(folder) / "peak"
        _run(["gcc", "-O2", "-march=native", "-o", str(program), str(SOURCE)])
        return float(_run([str(program), str(core)]))


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is missing: `make system-packages`") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)}: {error.stderr.strip()}") from None


if __name__ == "__main__":
    print(f"{measure():.1f} GFLOP/s a core")
