"""Compiles the benchmarks' own small C programs for this machine."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path


def compile_program(source: Path, folder: Path) -> Path:
    """The program of one C file, in `folder`.

    Raises:
        RuntimeError: gcc is missing, or failed.
    """
    program = folder / source.stem
    output_of(["gcc", "-O2", "-march=native", "-o", str(program), str(source)])
    return program


def output_of(command: Sequence[str]) -> str:
    """What the command prints.

    Raises:
        RuntimeError: it is missing, or failed.
    """
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is missing: run `make system-packages`") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{' '.join(command)}: {error.stderr.strip()}") from None
