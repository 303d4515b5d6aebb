"""The peers' own environment and the models exported for the comparison.

All is kept in the folder `peers` of graphopt's cache, and made again when what it is made from has
changed.
"""

from __future__ import annotations

import hashlib
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from graphopt.errors import GraphoptError
from graphopt.runtime.devices import cache_folder

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
EXPORTER = HERE / "export.py"
HINT = "run `make peers`."


class PeersMissingError(GraphoptError):
    """`make peers` has not been run, or not since what it makes things from has changed."""


def folder() -> Path:
    """Where everything of the peers is."""
    return cache_folder().resolve() / "peers"


def python() -> Path:
    """The interpreter of the peers' environment.

    Raises:
        PeersMissingError: there is none with the pinned versions.
    """
    place = folder() / "venv"
    if not _is_current(place, [REQUIREMENTS]):
        raise PeersMissingError(f"the peers are not installed in {place}", hint=HINT)
    return place / "bin" / "python"


def exported(name: str) -> Path:
    """The ONNX file of a model of `export.py`.

    Raises:
        PeersMissingError: it has not been exported.
    """
    place = folder() / "models"
    if not _is_current(place, [REQUIREMENTS, EXPORTER]):
        raise PeersMissingError(f"{name} has not been exported to {place}", hint=HINT)
    return place / f"{name}.onnx"


def make_environment() -> None:
    """A virtual environment with the pinned requirements, about 6 GB; nothing where it is there."""
    place = folder() / "venv"
    if _is_current(place, [REQUIREMENTS]):
        return
    print(f"installing the peers in {place}", flush=True)
    if not (place / "bin" / "python").exists():
        venv.create(place, with_pip=True, symlinks=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    requirements = ["--requirement", str(REQUIREMENTS)]
    subprocess.run([str(place / "bin" / "python"), *install, *requirements], check=True)
    _mark(place, [REQUIREMENTS])


def export_models() -> None:
    """The ONNX files, with random weights: no download; nothing where they are there."""
    place = folder() / "models"
    if _is_current(place, [REQUIREMENTS, EXPORTER]):
        return
    print(f"exporting models to {place}", flush=True)
    command = [str(python()), "-m", "bench.peers.export", str(place)]
    subprocess.run(command, check=True, cwd=HERE.parents[1])
    _mark(place, [REQUIREMENTS, EXPORTER])


def digest(files: Sequence[Path]) -> str:
    """One sha256 of the files' contents."""
    each = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256(" ".join(each).encode()).hexdigest()


def _is_current(made: Path, sources: Sequence[Path]) -> bool:
    stamp = made / ".made-from"
    return stamp.exists() and stamp.read_text() == digest(sources)


def _mark(made: Path, sources: Sequence[Path]) -> None:
    (made / ".made-from").write_text(digest(sources))
