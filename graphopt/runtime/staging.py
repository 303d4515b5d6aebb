"""Writing a folder so that others see all of it or nothing."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graphopt.errors import ArtifactError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# A process of another container cannot be seen; no build takes this long.
_STALE_SECONDS = 3600


@contextmanager
def staged_folder(folder: Path, *, replaceable: Callable[[Path], None]) -> Iterator[Path]:
    """A new empty folder beside `folder` that takes its place when the block ends well.

    `replaceable` raises if a folder that is already there must not be replaced; it is asked before
    the work and again after it. When the block raises, nothing is left; when the process is
    killed, a hidden folder is, which a later call for the same place removes.

    Raises:
        ArtifactError: the place cannot be written to.
    """
    folder = Path(os.path.realpath(folder))
    _check_place(folder, replaceable)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        stage = _sibling(folder)
        stage.mkdir()
    except OSError as error:
        raise ArtifactError(f"cannot write beside {folder}: {error.strerror}") from error
    try:
        yield stage
        _check_place(folder, replaceable)
        _put(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _check_place(folder: Path, replaceable: Callable[[Path], None]) -> None:
    if folder.is_dir():
        replaceable(folder)
    elif folder.exists():
        raise ArtifactError(f"{folder} is a file", hint="name a folder to build into.")


def _sibling(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.graphopt-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_stale(folder: Path) -> None:
    """Remove what builds that were killed left here."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.graphopt-(\d+)-[0-9a-f]{{8}}")
    for path in folder.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if not match or Path("/proc", match[1]).exists():
            continue
        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _put(stage: Path, folder: Path) -> None:
    """Move `stage` to `folder`; an older folder there ends up at `stage`."""
    if not folder.exists():
        stage.rename(folder)
        return
    if _exchange(stage, folder):
        return
    # The file system cannot swap: for a moment there is neither, but never half a folder.
    aside = _sibling(folder)
    folder.rename(aside)
    try:
        stage.rename(folder)
    except OSError:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two folders atomically (Linux renameat2); False where that is not possible."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    flags = ctypes.c_uint(_RENAME_EXCHANGE)
    return bool(rename(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), flags) == 0)
