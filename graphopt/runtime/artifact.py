"""Program + compiled kernels → the folder that ships: library, header, manifest, loader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from graphopt.backends import elf
from graphopt.backends.emit_c import (
    MAX_THREADS,
    WEIGHTS_FILE,
    check_program,
    emit_header,
    emit_source,
    emit_weights,
    kernel_symbol,
)
from graphopt.backends.target import Target
from graphopt.backends.toolchain import CompilerName, Toolchain, find_toolchain
from graphopt.errors import ArtifactError, GraphoptError
from graphopt.program.ir import Program
from graphopt.runtime.loader import FORMAT, FORMAT_VERSION
from graphopt.runtime.staging import staged_folder

RUNTIME_SOURCES = ("graphopt_runtime.c", "graphopt_pool.c", "graphopt_cpu.c")
RUNTIME_HEADERS = ("graphopt_runtime.h", "graphopt_api.h")
# The runtime's own work is a few atomics a step: small is what counts.
RUNTIME_FLAGS = ("-Os", "-fno-function-sections")
MODEL_FLAGS = ("-O2",)


@dataclass(frozen=True)
class Artifact:
    """A built folder.

    Attributes:
        folder: where it is.
        name: the model's name, the stem of every file.
        manifest: contents of `<name>.json`.
    """

    folder: Path
    name: str
    manifest: Mapping[str, Any]

    @property
    def library(self) -> Path:
        """The shared library."""
        return self.folder / f"lib{self.name}.so"

    @property
    def archive(self) -> Path:
        """The static library."""
        return self.folder / f"lib{self.name}.a"


def build_artifact(
    program: Program,
    target: Target,
    kernels_object: bytes,
    folder: str | Path,
    *,
    cc: CompilerName | None = None,
    threads: int | None = None,
    report: Mapping[str, Any] | None = None,
) -> Artifact:
    """Build `lib<name>.so`, `lib<name>.a`, `<name>.h`, `<name>.json`, `<name>.py` in `folder`.

    Nothing is seen at `folder` before all is done; an older build of the same model there is
    replaced in one step. The same arguments and compiler give the same bytes.

    Args:
        program: what the library does.
        target: the CPU it is for.
        kernels_object: a relocatable ELF object that defines `<name>_k_<symbol>` for every kernel.
        folder: where to; made if missing.
        cc: C compiler to use (see `find_toolchain`).
        threads: default number of threads of a context (None: 1).
        report: JSON data that goes into the manifest as it is.

    Raises:
        ToolchainError: no compiler for the target, or it failed.
        ArtifactError: `folder` holds something that is not an older build of this model.
        GraphoptError: the program or the object is not what it should be.
    """
    check_program(program)
    default_threads = 1 if threads is None else threads
    if not 1 <= default_threads <= MAX_THREADS:
        raise GraphoptError(
            f"threads={threads} is not possible", hint=f"a number from 1 to {MAX_THREADS}."
        )
    kernels = _check_kernels(program, target, kernels_object)
    toolchain = find_toolchain(target, cc)
    name = program.name
    with staged_folder(Path(folder), replaceable=lambda old: _check_ours(old, name)) as stage:
        work = stage / "work"
        work.mkdir()
        sources = write_sources(program, target, kernels, work, threads=default_threads)
        _link(name, sources, toolchain, work)
        for file in (f"lib{name}.so", f"lib{name}.a", f"{name}.h"):
            (work / file).rename(stage / file)
        for leftover in work.iterdir():
            leftover.unlink()
        work.rmdir()
        loader = resources.files("graphopt.runtime").joinpath("loader.py").read_bytes()
        (stage / f"{name}.py").write_bytes(loader)
        manifest = _manifest(program, target, toolchain, stage, default_threads, report)
        text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
        (stage / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    return Artifact(Path(folder), name, manifest)


def _version() -> str:
    return metadata.version("graphopt")


def _check_kernels(program: Program, target: Target, kernels: bytes) -> bytes:
    if not program.steps:
        return b""
    if elf.machine(kernels) != target.arch:
        raise GraphoptError(
            f"the kernels' object is for {elf.machine(kernels)}, the target for {target.arch}"
        )
    wanted = {kernel_symbol(program, step.kernel.symbol) for step in program.steps}
    defined = {s.name for s in elf.symbols(kernels) if s.defined and not s.local}
    if wanted - defined:
        raise GraphoptError(f"the kernels' object lacks {', '.join(sorted(wanted - defined))}")
    return elf.restrict(kernels, wanted.__contains__)


def write_sources(
    program: Program, target: Target, kernels: bytes, work: Path, *, threads: int
) -> tuple[str, ...]:
    """Write all that the library is compiled from to `work`; returns its C files.

    They are compiled in `work` with `-DGRAPHOPT_PREFIX=<name>` and linked with
    `<name>_kernels.o`, which is `kernels` as it is; a program without steps has none.
    """
    name = program.name
    csrc = resources.files("graphopt.runtime.csrc")
    for file in (*RUNTIME_SOURCES, *RUNTIME_HEADERS):
        (work / file).write_bytes(csrc.joinpath(file).read_bytes())
    version = _version()
    source = emit_source(program, target, threads=threads, version=version)
    (work / f"{name}_model.c").write_text(source, encoding="utf-8")
    header = emit_header(program, target, version=version)
    (work / f"{name}.h").write_text(header, encoding="utf-8")
    (work / WEIGHTS_FILE).write_bytes(emit_weights(program))
    if kernels:
        (work / f"{name}_kernels.o").write_bytes(kernels)
    return (f"{name}_model.c", *RUNTIME_SOURCES)


def _link(name: str, sources: tuple[str, ...], toolchain: Toolchain, work: Path) -> None:
    kernels = work / f"{name}_kernels.o"
    members = {kernels.name: kernels.read_bytes()} if kernels.exists() else {}
    for file in sources:
        # The archive's members carry the model's name, as several archives may meet in one link.
        stem = Path(file).stem.removeprefix("graphopt_").removeprefix(f"{name}_")
        made = f"{name}_{stem}.o"
        flags = RUNTIME_FLAGS if file in RUNTIME_SOURCES else MODEL_FLAGS
        flags = (f"-DGRAPHOPT_PREFIX={name}", *flags)
        members[made] = toolchain.compile(file, made, cwd=work, flags=flags)
    toolchain.link_shared(list(members), f"lib{name}.so", cwd=work)
    (work / f"lib{name}.a").write_bytes(elf.archive(members))


def _check_ours(folder: Path, name: str) -> None:
    """Guard: `folder` holds an older build of this model and nothing else."""
    present = {path.name for path in folder.iterdir()} - {"__pycache__"}
    if not present:
        return
    try:
        old = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        made = {f"{name}.json", *old["files"]} if old["format"] == FORMAT else set()
    except (OSError, ValueError, KeyError, TypeError):
        made = set()
    foreign = sorted(present - made)
    if foreign:
        raise ArtifactError(
            f"{folder} holds files that are not of an older build of {name}: "
            f"{', '.join(foreign[:5])}{', …' if len(foreign) > 5 else ''}",
            hint="graphopt replaces the whole folder; export to a folder of its own.",
        )


def _tensor(program: Program, name: str) -> dict[str, Any]:
    buffer = program.buffers[name]
    return {"name": name, "shape": list(buffer.shape), "dtype": buffer.dtype}


def _manifest(
    program: Program,
    target: Target,
    toolchain: Toolchain,
    stage: Path,
    threads: int,
    report: Mapping[str, Any] | None,
) -> dict[str, Any]:
    steps = [
        {
            "kernel": step.kernel.symbol,
            "generator": step.kernel.origin,
            "origin": list(step.origin),
            "ops": list(step.ops),
            "flops": step.flops,
            "bytes_read": sum(program.buffers[name].nbytes for name in step.reads),
            "bytes_written": sum(program.buffers[name].nbytes for name in step.writes),
            "tasks": step.tasks,
            "grain": step.grain,
        }
        for step in program.steps
    ]
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(stage.iterdir())
    }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "name": program.name,
        "target": {
            "name": target.name,
            "arch": target.arch,
            "triple": target.triple,
            "cpu": target.mcpu,
            "features": list(target.features),
            "emulator_cpu": target.emulator_cpu,
        },
        "inputs": [_tensor(program, name) for name in program.inputs],
        "outputs": [_tensor(program, name) for name in program.outputs],
        "memory": {
            "arena": program.arena,
            "scratch_per_thread": program.scratch,
            "weights": program.weights,
        },
        "threads": threads,
        "steps": steps,
        "report": dict(report or {}),
        "files": files,
        "versions": {
            "graphopt": _version(),
            "tvm": metadata.version("apache-tvm"),
            "compiler": toolchain.version,
        },
    }
