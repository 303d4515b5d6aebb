"""Targets as data: what a board's CPU is, and what the code for it may use."""

from __future__ import annotations

import difflib
import os
import platform
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from graphopt.backends.isa.avx2 import AVX2
from graphopt.backends.isa.avx512 import AVX512
from graphopt.backends.isa.base import Isa
from graphopt.backends.isa.neon import NEON
from graphopt.backends.isa.sse42 import SSE42
from graphopt.errors import TargetError


@dataclass(frozen=True)
class Target:
    """A CPU graphopt can build for.

    Attributes:
        name: what the user writes.
        arch: `x86_64` or `aarch64`.
        triple: LLVM's and the C compiler's name of the platform.
        mcpu: LLVM's name of the CPU (`generic` where only `features` count).
        features: CPU features the code may use, in LLVM's names; `_create` refuses a CPU without
            one of them.
        isa: the vector instruction set the kernel generators write for.
        l1_bytes, l2_bytes: data cache per core.
        last_bytes: the last-level cache; what is larger comes from memory.
        l1_ways: how many lines of the first-level data cache an address can be in.
        emulator_cpu: `qemu -cpu` name of the same CPU.
        description: one line for `graphopt targets`.
        model: the CPU that LLVM is to schedule for and to unroll for, if not `mcpu`; names no
            features of its own.
        llvm_options: command-line options of LLVM, as TVM's `cl-opt` takes them.
        cores: threads that work should be cut for; more of them still share it, less evenly.
    """

    name: str
    arch: str
    triple: str
    mcpu: str
    features: tuple[str, ...]
    isa: Isa
    l1_bytes: int
    l2_bytes: int
    emulator_cpu: str
    description: str
    model: str = ""
    llvm_options: tuple[str, ...] = ()
    cores: int = 4
    l1_ways: int = 8
    last_bytes: int = 8192 * 1024


_V2 = ("cx16", "sahf", "popcnt", "sse3", "ssse3", "sse4.1", "sse4.2")
_V3 = (*_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_KB = 1024


def _x86(
    name: str, features: tuple[str, ...], isa: Isa, cpu: str, description: str, l2: int = 512 * _KB
) -> Target:
    return Target(
        name, "x86_64", "x86_64-linux-gnu", "x86-64", features, isa, 32 * _KB, l2, cpu, description,
    )  # fmt: skip


def _arm(
    name: str, mcpu: str, features: tuple[str, ...], l1: int, l2: int, cpu: str, description: str,
    model: str = "", ways: int = 4, last: int = 512 * _KB,
) -> Target:  # fmt: skip
    return Target(
        name, "aarch64", "aarch64-linux-gnu", mcpu, features, NEON, l1, l2, cpu, description,
        model, _ARM_OPTIONS, l1_ways=ways, last_bytes=last,
    )  # fmt: skip


# LLVM would unroll a loop over, say, at most three rows of a kernel. They are further apart than a
# pair of loads reaches, so that depthwise kernels took twice as many loads. And it would unroll the
# two blocks of a pointwise convolution of 16 channels, and spill; by default the threshold is 300.
_ARM_OPTIONS = ("-unroll-max-upperbound:uint=1", "-unroll-threshold-aggressive:uint=150")
_V8 = ("fp-armv8", "neon")
_V82 = (*_V8, "crc", "lse", "rdm", "fullfp16", "dotprod")
# For the A53 LLVM unrolls every loop four times, which spills. `generic` is scheduled for a core in
# order too.
_A53 = _arm("cortex-a53", "cortex-a53", (*_V8, "crc"), 32 * _KB, 512 * _KB, "cortex-a53",
            "Cortex-A53 (Armv8.0-A, in order)", model="generic")  # fmt: skip
_A72 = _arm("cortex-a72", "cortex-a72", (*_V8, "crc"), 32 * _KB, 1024 * _KB, "cortex-a72",
            "Cortex-A72 (Armv8.0-A)", ways=2, last=1024 * _KB)  # fmt: skip
_A76 = _arm("cortex-a76", "cortex-a76", _V82, 64 * _KB, 512 * _KB, "cortex-a76",
            "Cortex-A76 (Armv8.2-A with dot product)", last=2048 * _KB)  # fmt: skip

_TARGETS = (
    _x86("x86-64-v2", _V2, SSE42, "Nehalem", "x86-64 with SSE4.2 (2008 and later)"),
    _x86("x86-64-v3", _V3, AVX2, "max", "x86-64 with AVX2 and FMA (2013 and later)"),
    _x86("x86-64-v4", _V4, AVX512, "max", "x86-64 with AVX-512", 1024 * _KB),
    _arm("arm", "generic", _V8, 32 * _KB, 512 * _KB, "cortex-a53", "any 64-bit Armv8-A, Linux"),
    _A53,
    _A72,
    _A76,
    replace(_A53, name="rpi3", description="Raspberry Pi 3 (Cortex-A53)"),
    replace(_A72, name="rpi4", description="Raspberry Pi 4 (Cortex-A72)"),
    replace(_A76, name="rpi5", description="Raspberry Pi 5 (Cortex-A76)"),
)

# LLVM's name of a feature → the kernel's name of it in /proc/cpuinfo, where they differ.
_CPUINFO_NAMES = {
    "sse3": "pni", "sse4.1": "sse4_1", "sse4.2": "sse4_2", "sahf": "lahf_lm", "bmi": "bmi1",
    "lzcnt": "abm", "fp-armv8": "fp", "neon": "asimd", "crc": "crc32", "lse": "atomics",
    "rdm": "asimdrdm", "fullfp16": "asimdhp", "dotprod": "asimddp",
}  # fmt: skip


def cpu_flags() -> frozenset[str]:
    """This machine's CPU features as /proc/cpuinfo names them."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, flags = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(flags.split())
    return frozenset()


def has_features(features: tuple[str, ...], flags: frozenset[str]) -> bool:
    """Whether every feature (LLVM's names) is among the flags (/proc/cpuinfo's names)."""
    return all(_CPUINFO_NAMES.get(feature, feature) in flags for feature in features)


def last_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """Bytes of this machine's last-level cache as the kernel reports it; 0 where it does not."""
    found = [(0, 0)]
    for index in folder.glob("index*"):
        # Boards whose device tree says nothing of them have caches without a size.
        with suppress(OSError, ValueError):
            kilobytes = (index / "size").read_text(encoding="utf-8").strip().removesuffix("K")
            level = int((index / "level").read_text(encoding="utf-8"))
            found.append((level, int(kilobytes) * _KB))
    return max(found)[1]


@cache
def host() -> Target:
    """The best target whose every feature this machine really reports.

    The CPU's family is not asked: a hypervisor may hide features that the family has.

    Raises:
        TargetError: this machine is neither x86-64 with SSE4.2 nor 64-bit Arm.
    """
    flags = cpu_flags()
    machine = platform.machine()
    order = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "cortex-a76", "arm")
    for name in order:
        target = next(t for t in _TARGETS if t.name == name)
        if target.arch == machine and has_features(target.features, flags):
            return replace(
                target,
                name="host",
                description=f"this machine ({target.description})",
                cores=len(os.sched_getaffinity(0)),
                last_bytes=last_cache() or target.last_bytes,
            )
    raise TargetError(
        f"no target fits this machine ({machine})",
        hint="graphopt builds for x86-64 with at least SSE4.2 and for 64-bit Arm; "
        "name a target explicitly to cross-compile.",
    )


def targets() -> dict[str, Target]:
    """Every target by name, `host` first."""
    return {"host": host(), **{target.name: target for target in _TARGETS}}


def get_target(target: str | Target) -> Target:
    """The target of this name (a `Target` passes through).

    Raises:
        TargetError: no such target; the message offers the nearest names.
    """
    if isinstance(target, Target):
        return target
    known = targets()
    if target in known:
        return known[target]
    near = difflib.get_close_matches(str(target).lower(), known, n=3, cutoff=0.4)
    offer = f"did you mean {' or '.join(near)}? " if near else ""
    raise TargetError(
        f"unknown target {target!r}",
        hint=f"{offer}known targets: {', '.join(known)} (see `graphopt targets`).",
    )
