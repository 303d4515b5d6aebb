"""Where an artifact runs: this machine, an emulator of another CPU, later a board over ssh.

A device needs one thing only: to start the runner program (`csrc/runner.c`, static, one file) with
bytes on its standard input and to get its standard output and error back.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import platformdirs

from graphopt.backends.target import Target, targets
from graphopt.backends.toolchain import CompilerName, find_toolchain
from graphopt.errors import ArtifactError, TargetError
from graphopt.runtime.loader import Array, Tensor, read_manifest
from graphopt.runtime.staging import staged_folder

_LIBRARY_REFUSED = 10  # the runner's exit status: this plus the library's status


class Device(Protocol):
    """Something that runs artifacts. Inputs and outputs are in the model's order."""

    def run(
        self, folder: Path, inputs: Sequence[Array], *, threads: int | None = None
    ) -> tuple[Array, ...]:
        """The outputs for these inputs (already of the model's shapes and dtypes)."""
        ...

    def time(
        self,
        folder: Path,
        inputs: Sequence[Array],
        *,
        repeats: int = 10,
        warmup: int = 1,
        threads: int | None = None,
    ) -> list[float]:
        """Seconds of each of `repeats` runs after `warmup` runs."""
        ...


def cache_folder() -> Path:
    """Where built runners are kept: `GRAPHOPT_CACHE`, or the user's cache folder."""
    named = os.environ.get("GRAPHOPT_CACHE")
    return Path(named) if named else platformdirs.user_cache_path("graphopt")


def _link_target(manifest: Mapping[str, Any]) -> Target:
    """A target of the architecture in a manifest: all that linking for it takes."""
    arch = manifest["target"]["arch"]
    for target in targets().values():
        if target.arch == arch:
            return target
    raise TargetError(f"{manifest['name']} was built for {arch}, which this graphopt cannot link")


def build_runner(
    folder: str | Path, *, cc: CompilerName | None = None, cache: Path | None = None
) -> Path:
    """The static program that runs the artifact in `folder` on its target; built once, then cached.

    Args:
        folder: what `build_artifact` wrote.
        cc: C compiler to use (see `find_toolchain`).
        cache: where runners are kept (None: `cache_folder()`).

    Raises:
        ArtifactError: no artifact there.
        ToolchainError: no compiler for its target, or it failed.
    """
    folder = Path(folder)
    manifest = read_manifest(folder, ArtifactError)
    name = manifest["name"]
    toolchain = find_toolchain(_link_target(manifest), cc)
    source = resources.files("graphopt.runtime.csrc").joinpath("runner.c").read_bytes()
    parts = {
        "runner.c": source,
        f"{name}.h": _read(folder / f"{name}.h"),
        f"lib{name}.a": _read(folder / f"lib{name}.a"),
    }
    digest = hashlib.sha256(repr((toolchain.command, toolchain.version)).encode())
    for content in parts.values():
        digest.update(hashlib.sha256(content).digest())
    place = (cache or cache_folder()) / "runners" / digest.hexdigest()[:32]
    program = place / f"run_{name}"
    if program.exists():
        return program
    with staged_folder(place, replaceable=lambda _: None) as stage:
        for file, content in parts.items():
            (stage / file).write_bytes(content)
        toolchain.link_program(
            ["runner.c", f"lib{name}.a"],
            program.name,
            cwd=stage,
            flags=(f"-DGRAPHOPT_MODEL={name}", f'-DGRAPHOPT_HEADER="{name}.h"'),
        )
        for file in parts:
            (stage / file).unlink()
    return program


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} is missing: the build is not complete") from error


class RunnerDevice:
    """A device that starts the runner program with a command; subclasses say which.

    Args:
        cc: C compiler to build the runner with (see `find_toolchain`).
        cache: where runners are kept (None: `cache_folder()`).
    """

    def __init__(self, *, cc: CompilerName | None = None, cache: Path | None = None) -> None:
        """See the class for the arguments."""
        self.cc = cc
        self.cache = cache

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Guard, before anything is built for it.

        Raises:
            TargetError: this device cannot run artifacts of that target.
        """

    def command(self, program: Path, manifest: Mapping[str, Any]) -> list[str]:
        """What to execute to run `program`; a remote device copies it first."""
        raise NotImplementedError

    def run(
        self, folder: Path, inputs: Sequence[Array], *, threads: int | None = None
    ) -> tuple[Array, ...]:
        """See `Device.run`."""
        return self._start(folder, inputs, ["--repeat", "1"], threads)[0]

    def time(
        self,
        folder: Path,
        inputs: Sequence[Array],
        *,
        repeats: int = 10,
        warmup: int = 1,
        threads: int | None = None,
    ) -> list[float]:
        """See `Device.time`."""
        options = ["--repeat", str(repeats), "--warmup", str(warmup)]
        return self._start(folder, inputs, options, threads)[1]

    def _start(
        self, folder: Path, inputs: Sequence[Array], options: list[str], threads: int | None
    ) -> tuple[tuple[Array, ...], list[float]]:
        manifest = read_manifest(folder, ArtifactError)
        self.check(manifest)
        command = [
            *self.command(build_runner(folder, cc=self.cc, cache=self.cache), manifest),
            *options,
            *(["--threads", str(threads)] if threads else []),
        ]
        data = b"".join(np.ascontiguousarray(array).tobytes() for array in inputs)
        result = subprocess.run(command, input=data, capture_output=True)
        messages = result.stderr.decode(errors="replace")
        if result.returncode >= _LIBRARY_REFUSED:
            raise ArtifactError(messages.strip() or f"the library refused ({result.returncode})")
        if result.returncode != 0:
            raise ArtifactError(
                f"the runner of {manifest['name']} ended with {result.returncode}: "
                f"{messages.strip() or 'no message'}"
            )
        return _split(manifest, result.stdout), [
            int(line.split()[1]) / 1e9
            for line in messages.splitlines()
            if line.startswith("time_ns ")
        ]


def _split(manifest: Mapping[str, Any], data: bytes) -> tuple[Array, ...]:
    tensors = [Tensor(entry) for entry in manifest["outputs"]]
    if len(data) != sum(tensor.nbytes for tensor in tensors):
        raise ArtifactError(f"the runner of {manifest['name']} gave {len(data)} bytes of output")
    arrays = []
    for tensor in tensors:
        flat = np.frombuffer(data[: tensor.nbytes], tensor.dtype).copy()
        arrays.append(flat.reshape(tensor.shape))
        data = data[tensor.nbytes :]
    return tuple(arrays)


class LocalDevice(RunnerDevice):
    """This machine."""

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Guard: the artifact is for this kind of CPU."""
        if manifest["target"]["arch"] != platform.machine():
            raise TargetError(
                f"{manifest['name']} was built for {manifest['target']['arch']}; this machine is "
                f"{platform.machine()}",
                hint="use EmulatorDevice(), or copy it to a board.",
            )

    def command(self, program: Path, manifest: Mapping[str, Any]) -> list[str]:
        """The program itself."""
        return [str(program)]


class EmulatorDevice(RunnerDevice):
    """QEMU's user-mode emulator. Right about results and instructions, not about speed.

    Args:
        cpu: `qemu -cpu` name (default: the artifact's target says).
        cc: C compiler to build the runner with.
    """

    def __init__(self, cpu: str | None = None, *, cc: CompilerName | None = None) -> None:
        """See the class for the arguments."""
        super().__init__(cc=cc)
        self.cpu = cpu

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Guard: the emulator is installed."""
        find_emulator(manifest["target"]["arch"])

    def command(self, program: Path, manifest: Mapping[str, Any]) -> list[str]:
        """`qemu-<arch> -cpu <cpu> program`."""
        target = manifest["target"]
        return [find_emulator(target["arch"]), "-cpu", self.cpu or target["emulator_cpu"],
                str(program)]  # fmt: skip


def find_emulator(arch: str) -> str:
    """Path of `qemu-<arch>`.

    Raises:
        TargetError: it is not installed.
    """
    for name in (f"qemu-{arch}", f"qemu-{arch}-static"):
        found = shutil.which(name)
        if found:
            return found
    raise TargetError(
        f"no emulator for {arch} on this machine: qemu-{arch} was not found",
        hint="`apt install qemu-user`, or run the library on a board of its own kind.",
    )
