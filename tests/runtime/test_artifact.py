"""What is built: complete, small, self-contained, reproducible, all or nothing."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runtime_programs import (
    build_rows,
    compile_kernels,
    output_of,
    rows_inputs,
    rows_kernels,
    rows_program,
    tool,
)

from graphopt.backends import elf
from graphopt.backends.target import get_target
from graphopt.errors import ArtifactError, GraphoptError, TargetError, ToolchainError
from graphopt.program.ir import Buffer, Program
from graphopt.runtime import staging
from graphopt.runtime.artifact import Artifact, build_artifact
from graphopt.runtime.load import load

FILES = ["librows.a", "librows.so", "rows.h", "rows.json", "rows.py"]
KB = 1024


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_folder_holds_five_files_and_the_manifest_knows_them(host_rows: Artifact) -> None:
    files = contents(host_rows.folder)
    assert list(files) == FILES
    manifest = json.loads(files.pop("rows.json"))
    assert manifest == host_rows.manifest
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    assert manifest["inputs"][1] == {"name": "row.ids", "shape": [4], "dtype": "int64"}
    assert manifest["memory"] == {"arena": 3328, "scratch_per_thread": 128, "weights": 192}
    assert manifest["steps"][0]["origin"] == ["net.scale"]
    assert manifest["threads"] == 2
    assert set(manifest["versions"]) == {"graphopt", "tvm", "compiler"}


@pytest.mark.parametrize("target", ["host", "arm"])
def test_two_builds_are_identical_and_hold_no_path(tmp_path: Path, target: str) -> None:
    report = {"passes": [{"name": "fold", "changed": 3}]}
    first = build_rows(tmp_path / "a" / "one", get_target(target), report=report)
    second = build_rows(tmp_path / "b", get_target(target), report=report)
    assert contents(first.folder) == contents(second.folder)
    for name, data in contents(first.folder).items():
        assert str(tmp_path).encode() not in data, name
        assert b"graphopt-" not in data.replace(b"graphopt-artifact", b"") or name == "rows.py"


@pytest.mark.parametrize("which", ["host_rows", "arm_rows"])
def test_needs_libc_at_most_and_exports_the_interface_only(
    request: pytest.FixtureRequest, which: str
) -> None:
    artifact = request.getfixturevalue(which)
    readelf = tool("readelf", "binutils")
    dynamic = output_of(readelf, "-d", artifact.library)
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert needed <= {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert "soname: [librows.so]" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    symbols = output_of(readelf, "--dyn-syms", "-W", artifact.library).splitlines()
    exported = {line.split()[7] for line in symbols if " GLOBAL " in line and " UND " not in line}
    assert exported == {f"rows_{name}" for name in (
        "arena_size", "create", "destroy", "get_info", "last_error", "profile", "run",
        "status_text",
    )}  # fmt: skip
    stack = next(line for line in output_of(readelf, "-lW", artifact.library).splitlines()
                 if "GNU_STACK" in line)  # fmt: skip
    assert "RWE" not in stack
    assert "build ID" not in output_of(readelf, "-n", artifact.library).lower()


@pytest.mark.parametrize("which", ["host_rows", "arm_rows"])
def test_the_archive_lists_well_and_the_runtime_is_small(
    request: pytest.FixtureRequest, which: str, tmp_path: Path
) -> None:
    artifact = request.getfixturevalue(which)
    ar = tool("ar", "binutils")
    listing = output_of(ar, "tv", artifact.archive)
    assert listing.count("0/0") == 5, "owners must be zero"
    output_of(ar, "x", artifact.archive, cwd=tmp_path)
    runtime = [tmp_path / f"rows_{part}.o" for part in ("runtime", "pool", "cpu")]
    assert sum(path.stat().st_size for path in runtime) <= 16 * KB
    # Only kernels and the interface can be linked against from outside their object.
    for path in tmp_path.glob("*.o"):
        for symbol in elf.symbols(path.read_bytes()):
            assert not symbol.defined or symbol.local or symbol.name.startswith("rows_")


def test_localized_symbols_keep_their_references() -> None:
    kernels = rows_kernels(get_target("host"))
    assert {"common_helper", "__extendhfsf2"} <= {s.name for s in elf.symbols(kernels)}
    restricted = elf.restrict(kernels, lambda name: name.startswith("rows_k_"))
    by_name = {symbol.name: symbol for symbol in elf.symbols(restricted)}
    assert by_name["common_helper"].local
    assert by_name["__extendhfsf2"].local
    assert by_name["rows_k_pick"].hidden
    assert not by_name["rows_k_pick"].local
    assert len(elf.symbols(restricted)) == len(elf.symbols(kernels))
    # Local symbols come first, as ELF wants it.
    locality = [symbol.local for symbol in elf.symbols(restricted)]
    assert locality == sorted(locality, reverse=True)


def test_an_older_build_is_replaced_and_anything_else_refused(tmp_path: Path) -> None:
    host = get_target("host")
    folder = tmp_path / "out"
    folder.mkdir()
    build_rows(folder, host)
    (folder / "__pycache__").mkdir()
    build_rows(folder, host, threads=3)
    assert json.loads((folder / "rows.json").read_text())["threads"] == 3
    (folder / "main.c").write_text("the user's own")
    before = contents(folder)
    with pytest.raises(ArtifactError, match=r"main\.c"):
        build_rows(folder, host)
    assert contents(folder) == before
    (folder / "main.c").unlink()
    with pytest.raises(ArtifactError, match="not of an older build of other"):
        build_rows(folder, host, name="other")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        build_rows(tmp_path / "file", host)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_replacing_works_where_folders_cannot_be_swapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    for threads in (1, 2):
        build_rows(tmp_path / "out", get_target("host"), threads=threads)
        assert json.loads((tmp_path / "out/rows.json").read_text())["threads"] == threads
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    program = rows_program()
    kernels = compile_kernels(
        "".join(f"void missing(void); void rows_k_{name}(void) {{ missing(); }}\n"
                for name in ("scale", "cumulate", "pick", "total")), get_target("host"),
    )  # fmt: skip
    with pytest.raises(ToolchainError, match="missing") as caught:
        build_artifact(program, get_target("host"), kernels, tmp_path / "out")
    assert "$ " in str(caught.value), "the message must hold the command"
    assert list(tmp_path.iterdir()) == []


_KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from runtime_programs import build_rows
from graphopt.backends.target import get_target
build_rows(Path(sys.argv[2]), get_target("host"), cc=sys.argv[3])
"""


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_build_leaves_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: signal.Signals
) -> None:
    slow = tmp_path / "slow-cc"
    slow.write_text(
        '#!/bin/sh\ncase "$*" in *-shared*) touch "$(dirname "$0")/linking"; sleep 3;; esac\n'
        'exec gcc "$@"\n'
    )
    slow.chmod(0o755)
    place = tmp_path / "place"
    command = [sys.executable, "-c", _KILLED, str(Path(__file__).parent), str(place / "out"),
               str(slow)]  # fmt: skip
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "linking").exists() and time.monotonic() < deadline:
            assert process.poll() is None, "the build ended before it could be killed"
            time.sleep(0.02)
        process.send_signal(kill)
    assert not (place / "out").exists()
    monkeypatch.setattr(staging, "_STALE_SECONDS", -1)
    build_rows(place / "out", get_target("host"))
    assert [path.name for path in place.iterdir()] == ["out"], "the stale folder must go"


def _rename(buffer: str, **changes: object) -> Callable[[], None]:
    def build() -> None:
        program = rows_program()
        buffers = dict(program.buffers)
        buffers[buffer] = replace(buffers[buffer], **changes)
        build_artifact(replace(program, buffers=buffers), get_target("host"), b"", "unused")

    return build


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (_rename("a", offset=8), "misaligned"),
        (_rename("b", offset=3328), "outside its 3328"),
        (_rename("w", data=None), "no data"),
        (_rename("x", dtype="complex64"), "cannot be passed"),
        (_rename("x", nbytes=1), "cannot be passed"),
        (_rename("x", role="arena", offset=0), "no such buffer"),
    ],
)
def test_a_broken_program_is_refused(build: Callable[[], None], words: str) -> None:
    with pytest.raises(GraphoptError, match=words):
        build()


def test_other_wrong_arguments_are_refused(tmp_path: Path) -> None:
    host, arm = get_target("host"), get_target("arm")
    kernels = rows_kernels(host)
    for name in ("my-model", "", "2d", "x" * 65, "pthread", "json", "numpy", "int", "lambda"):
        with pytest.raises(GraphoptError, match="name of a library"):
            build_artifact(rows_program(name), host, kernels, tmp_path / "x")
    with pytest.raises(GraphoptError, match="threads=0"):
        build_artifact(rows_program(), host, kernels, tmp_path / "x", threads=0)
    with pytest.raises(GraphoptError, match="lacks other_k_cumulate, other_k_pick"):
        build_artifact(rows_program("other"), host, kernels, tmp_path / "x")
    with pytest.raises(GraphoptError, match="aarch64"):
        build_artifact(rows_program(), host, rows_kernels(arm), tmp_path / "x")
    with pytest.raises(ToolchainError, match="ELF"):
        build_artifact(rows_program(), host, b"rubbish", tmp_path / "x")
    unknown = replace(host, features=("telepathy",))
    with pytest.raises(TargetError, match="telepathy"):
        build_artifact(rows_program(), unknown, kernels, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_steps_builds(tmp_path: Path) -> None:
    out = Buffer("y", (1,), "int8", "plain", "output", 1)
    empty = Program("empty", (), {"y": out}, (), ("y",), 0, 0, 0)
    artifact = build_artifact(empty, get_target("host"), b"", tmp_path / "out")
    with load(artifact.folder) as model:
        assert model().shape == (1,)


def test_tables_are_mapped_for_random_reads(tmp_path: Path) -> None:
    """With any place in the file and less than a page, too."""
    program = rows_program()
    places = ((64 * 5, 300_000), (64 * 20_000, 16), (64 * 20_001, 70_001))
    tables = [
        Buffer(f"table{i}", (n,), "float32", "plain", "constant", 4 * n, offset,
               np.arange(n, dtype=np.float32), sparse=True)
        for i, (offset, n) in enumerate(places)
    ]  # fmt: skip
    large = replace(program, buffers={**program.buffers, **{t.name: t for t in tables}},
                    weights=64 * 30_000)  # fmt: skip
    target = get_target("host")
    artifact = build_artifact(large, target, rows_kernels(target), tmp_path / "out")
    with load(artifact.folder) as model:
        model(*rows_inputs())
        mapped = advised_bytes(artifact.library)
    page = os.sysconf("SC_PAGESIZE")
    assert len(mapped) == 2
    for table, found in zip((tables[0], tables[2]), mapped, strict=True):
        assert table.nbytes - 2 * page < found <= table.nbytes


def advised_bytes(library: Path) -> list[int]:
    """Sizes of the parts of a library that the system was told are read at random, in order."""
    maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
    found = []
    for mapping, after in itertools.pairwise(maps):
        flags = after.split("\n")[0].split()
        lines = mapping.split("\n")
        size = next(int(line.split()[1]) for line in lines if line.startswith("Size:"))
        if str(library) in mapping and "rr" in flags:
            found.append(size * KB)
    return found


def test_names_that_collide_as_macros_are_told_apart(tmp_path: Path) -> None:
    program = rows_program()
    names = {"x": "v", "row.ids": "v_bytes", "picked": "v.b", "total": "v-b"}
    buffers = {names.get(k, k): replace(b, name=names.get(k, k)) for k, b in
               program.buffers.items()}  # fmt: skip

    def renamed(used: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(names.get(name, name) for name in used)

    steps = tuple(
        replace(
            step, args=renamed(step.args), reads=renamed(step.reads), writes=renamed(step.writes)
        )
        for step in program.steps
    )
    program = replace(program, buffers=buffers, steps=steps, inputs=("v", "v_bytes"),
                      outputs=("v.b", "v-b"))  # fmt: skip
    host = get_target("host")
    artifact = build_artifact(program, host, rows_kernels(host), tmp_path / "out")
    header = (artifact.folder / "rows.h").read_text()
    macros = [line.split()[1] for line in header.splitlines() if line.startswith("#define ROWS_")]
    assert len(macros) == len(set(macros))
    assert "#define ROWS_OUTPUT_V_B_1 1" in header


def test_archive_members_of_odd_size_are_padded() -> None:
    kernels = rows_kernels(get_target("host"))
    data = elf.archive({"odd.o": kernels + b"\0", "even.o": kernels})
    assert len(data) % 2 == 0
    stream = io.BytesIO(data)
    assert stream.read(8) == b"!<arch>\n"
    sizes = []
    while header := stream.read(60):
        assert header.endswith(b"`\n")
        sizes.append(int(header[48:58]))
        stream.seek(sizes[-1] + sizes[-1] % 2, io.SEEK_CUR)
    assert sizes[2:] == [len(kernels) + 1, len(kernels)]
