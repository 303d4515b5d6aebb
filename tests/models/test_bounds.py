"""No kernel of the real models touches memory beside its tensors; see `guarded.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "arguments",
    ["mobilenet_v2", "mobilenet_v2 1000000", "ppocr_rec", "ddddocr_det", "minilm",
     "light_squeezenet", "light_shufflenet"],
)  # fmt: skip
def test_stays_inside_its_tensors(arguments: str) -> None:
    command = [sys.executable, "-m", "tests.models.guarded", *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
