"""Finds a C compiler for a target, compiles with it and links with it.

Looked for in this order: the `cc` the user names, the environment's `GRAPHOPT_CC_<ARCH>`, the
system's compiler (native, or `<triple>-gcc`), and PyPI's `ziglang`.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from graphopt.backends import elf
from graphopt.backends.target import Target
from graphopt.errors import ToolchainError

CompilerName = str | Sequence[str]

# The runtime and the model's table run before the CPU is checked: nothing beyond the baseline.
_BASELINE = {"x86_64": ("-march=x86-64", "-mtune=generic"), "aarch64": ("-march=armv8-a",)}
_ZIG_BASELINE = {"x86_64": ("-mcpu=x86_64",), "aarch64": ("-mcpu=generic",)}
_APT = {"x86_64": "gcc-x86-64-linux-gnu", "aarch64": "gcc-aarch64-linux-gnu"}
# zig brings every glibc: link for one that boards in the field have (Debian 10, 2019).
_ZIG_GLIBC = "2.28"

_COMPILE = (
    "-std=c11", "-fPIC", "-fvisibility=hidden", "-fno-unwind-tables",
    "-fno-asynchronous-unwind-tables", "-ffunction-sections", "-g0",
)  # fmt: skip
# norelro: with the 64 KB pages of some Arm systems, relro pads a library of 15 KB to 67.
_LINK = (
    "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-Wl,-z,norelro", "-Wl,-z,now",
    "-Wl,--gc-sections", "-Wl,--as-needed", "-s",
)  # fmt: skip
_LIBRARIES = ("-lm", "-lpthread")


@dataclass(frozen=True)
class Toolchain:
    """A C compiler that makes code for one architecture.

    Attributes:
        command: what to run, without the baseline flags.
        arch: `x86_64` or `aarch64`.
        flags: keep the compiler to the architecture's baseline.
        shared, static: further flags for a shared library and for a static program.
        version: the compiler's own words, one line.
    """

    command: tuple[str, ...]
    arch: str
    flags: tuple[str, ...]
    shared: tuple[str, ...]
    static: tuple[str, ...]
    version: str

    def compile(
        self, source: str, output: str, *, cwd: Path, flags: Sequence[str] = ("-O2",)
    ) -> bytes:
        """Compile one C file, both paths relative to `cwd`; returns the object.

        Raises:
            ToolchainError: the compiler failed, or makes code for another architecture.
        """
        prefix_map = f"-ffile-prefix-map={cwd}=."
        self._run([*self.flags, *self.shared, *_COMPILE, prefix_map, *flags, "-c", source,
                   "-o", output], cwd)  # fmt: skip
        made = (cwd / output).read_bytes()
        if elf.machine(made) != self.arch:
            raise ToolchainError(
                f"`{shlex.join(self.command)}` makes code for {elf.machine(made)}, "
                f"not for {self.arch}",
                hint=_install_hint(self.arch),
            )
        return made

    def link_shared(self, objects: Sequence[str], output: str, *, cwd: Path) -> None:
        """Link a shared library that needs at most libc, libm and libpthread."""
        self._run([*self.flags, *self.shared, "-shared", *_LINK, "-Wl,-z,defs",
                   f"-Wl,-soname,{Path(output).name}", *objects,
                   *_LIBRARIES, "-o", output], cwd)  # fmt: skip

    def link_program(
        self, sources: Sequence[str], output: str, *, cwd: Path, flags: Sequence[str] = ()
    ) -> None:
        """Compile and link a static program, which runs on any Linux of the architecture."""
        self._run([*self.flags, *self.static, "-std=c11", "-O2", *flags, "-static", *_LINK,
                   *sources, *_LIBRARIES, "-o", output], cwd)  # fmt: skip

    def _run(self, args: Sequence[str], cwd: Path) -> None:
        _run([*self.command, *args], cwd)


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    # Compilers translate their messages; reports and tests want them in one language.
    environment = {**os.environ, "LC_ALL": "C", "SOURCE_DATE_EPOCH": "0"}
    try:
        result = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise ToolchainError(
            f"cannot run the C compiler `{shlex.join(command[:1])}`: {error.strerror}",
            hint="name a working one with cc= or GRAPHOPT_CC_<ARCH>.",
        ) from error
    if result.returncode != 0:
        raise ToolchainError(
            f"the C compiler failed (exit {result.returncode}):\n"
            f"$ {shlex.join(command)}\n{(result.stderr or result.stdout).strip()}"
        )
    return result.stdout


def find_toolchain(
    target: Target,
    cc: CompilerName | None = None,
    *,
    environment: Mapping[str, str] | None = None,
) -> Toolchain:
    """The C compiler to use for `target`.

    Args:
        target: what to compile for.
        cc: a compiler command to use and no other; a string is split as a shell would.
        environment: where to look for `GRAPHOPT_CC_<ARCH>` and `PATH` (default: the process's).

    Raises:
        ToolchainError: none was found; the message says what to install.
    """
    environment = os.environ if environment is None else environment
    named = cc or environment.get(f"GRAPHOPT_CC_{target.arch.upper()}")
    if named:
        command = tuple(shlex.split(named)) if isinstance(named, str) else tuple(named)
        return _named(command, target)
    for name in _system_names(target):
        found = shutil.which(name, path=environment.get("PATH"))
        if found:
            return _gcc((found,), target)
    if importlib.util.find_spec("ziglang") is not None:
        return _zig((sys.executable, "-m", "ziglang", "cc"), target)
    raise ToolchainError(
        f"no C compiler for {target.name} ({target.triple}) was found",
        hint=_install_hint(target.arch),
    )


def _system_names(target: Target) -> tuple[str, ...]:
    cross = (f"{target.triple}-gcc",)
    return ("gcc", "cc", *cross) if platform.machine() == target.arch else cross


def _install_hint(arch: str) -> str:
    package = "gcc" if platform.machine() == arch else _APT.get(arch, f"a gcc for {arch}")
    return (
        f"`apt install {package}`, or `pip install graphopt[cross]` (PyPI ziglang), "
        f"or name a compiler with cc= or GRAPHOPT_CC_{arch.upper()}."
    )


def _named(command: tuple[str, ...], target: Target) -> Toolchain:
    # `zig cc` and `python -m ziglang cc`: if the user chose zig's own -target, we leave it alone.
    is_zig = len(command) > 1 and command[-1] == "cc" and "zig" in Path(command[-2]).name
    return _zig(command, target) if is_zig else _gcc(command, target)


def _gcc(command: tuple[str, ...], target: Target) -> Toolchain:
    version = _run([*command, "--version"]).strip().splitlines()
    return Toolchain(
        command, target.arch, _BASELINE[target.arch], (), (), version[0] if version else "unknown"
    )


def _zig(command: tuple[str, ...], target: Target) -> Toolchain:
    version = _run([*command[:-1], "version"]).strip()
    return Toolchain(
        command,
        target.arch,
        (*_ZIG_BASELINE[target.arch], "-fno-sanitize=all"),
        # glibc cannot be linked statically with zig: boards' own for the .so, musl for programs.
        ("-target", f"{target.arch}-linux-gnu.{_ZIG_GLIBC}"),
        ("-target", f"{target.arch}-linux-musl"),
        f"zig {version}",
    )
