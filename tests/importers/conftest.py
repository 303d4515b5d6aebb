"""Puts the repository on the import path: `tests.models` is found wherever pytest starts."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    sys.path.insert(0, ROOT)
