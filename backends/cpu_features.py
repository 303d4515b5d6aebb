"""How a library asks the CPU it runs on for each feature a target may use: data only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.errors import TargetError

_EAX, _EBX, _ECX, _EDX = range(4)
_YMM = 0x6  # xcr0: the system saves the SSE and AVX registers
_ZMM = 0xE6  # and the AVX-512 ones
_AT_HWCAP, _AT_HWCAP2 = 16, 26


@dataclass(frozen=True)
class Probe:
    """Where a feature's bits are.

    Attributes:
        leaf: x86: cpuid leaf; Arm: which auxiliary vector entry (AT_HWCAP or AT_HWCAP2).
        subleaf: x86: cpuid subleaf.
        reg: x86: 0 to 3 for eax, ebx, ecx, edx.
        mask: the bits that must all be set.
        xcr0: x86: the register states the operating system must save.
    """

    leaf: int
    subleaf: int
    reg: int
    mask: int
    xcr0: int = 0


def _cpuid(leaf: int, reg: int, bit: int, xcr0: int = 0, subleaf: int = 0) -> Probe:
    return Probe(leaf, subleaf, reg, 1 << bit, xcr0)


def _hwcap(*bits: int) -> Probe:
    return Probe(_AT_HWCAP, 0, 0, sum(1 << bit for bit in bits))


def _hwcap2(bit: int) -> Probe:
    return Probe(_AT_HWCAP2, 0, 0, 1 << bit)


# Intel SDM volume 2A, CPUID; names are LLVM's.
_X86_64 = {
    "sse3": _cpuid(1, _ECX, 0),
    "pclmul": _cpuid(1, _ECX, 1),
    "ssse3": _cpuid(1, _ECX, 9),
    "fma": _cpuid(1, _ECX, 12, _YMM),
    "cx16": _cpuid(1, _ECX, 13),
    "sse4.1": _cpuid(1, _ECX, 19),
    "sse4.2": _cpuid(1, _ECX, 20),
    "movbe": _cpuid(1, _ECX, 22),
    "popcnt": _cpuid(1, _ECX, 23),
    "aes": _cpuid(1, _ECX, 25),
    "xsave": _cpuid(1, _ECX, 26),
    "avx": _cpuid(1, _ECX, 28, _YMM),
    "f16c": _cpuid(1, _ECX, 29, _YMM),
    "bmi": _cpuid(7, _EBX, 3),
    "avx2": _cpuid(7, _EBX, 5, _YMM),
    "bmi2": _cpuid(7, _EBX, 8),
    "avx512f": _cpuid(7, _EBX, 16, _ZMM),
    "avx512dq": _cpuid(7, _EBX, 17, _ZMM),
    "avx512ifma": _cpuid(7, _EBX, 21, _ZMM),
    "avx512cd": _cpuid(7, _EBX, 28, _ZMM),
    "avx512bw": _cpuid(7, _EBX, 30, _ZMM),
    "avx512vl": _cpuid(7, _EBX, 31, _ZMM),
    "avx512vbmi": _cpuid(7, _ECX, 1, _ZMM),
    "avx512vbmi2": _cpuid(7, _ECX, 6, _ZMM),
    "avx512vnni": _cpuid(7, _ECX, 11, _ZMM),
    "avx512bitalg": _cpuid(7, _ECX, 12, _ZMM),
    "avx512vpopcntdq": _cpuid(7, _ECX, 14, _ZMM),
    "avx512fp16": _cpuid(7, _EDX, 23, _ZMM),
    "avxvnni": _cpuid(7, _EAX, 4, _YMM, subleaf=1),
    "avx512bf16": _cpuid(7, _EAX, 5, _ZMM, subleaf=1),
    "avxifma": _cpuid(7, _EAX, 23, _YMM, subleaf=1),
    "avxvnniint8": _cpuid(7, _EDX, 4, _YMM, subleaf=1),
    "sahf": _cpuid(0x80000001, _ECX, 0),
    "lzcnt": _cpuid(0x80000001, _ECX, 5),
}

# Linux, Documentation/arch/arm64/elf_hwcaps.rst; names are LLVM's.
_AARCH64 = {
    "fp-armv8": _hwcap(0),
    "neon": _hwcap(1),
    "aes": _hwcap(3, 4),
    "sha2": _hwcap(5, 6),
    "crc": _hwcap(7),
    "lse": _hwcap(8),
    "fullfp16": _hwcap(9, 10),
    "rdm": _hwcap(12),
    "jsconv": _hwcap(13),
    "complxnum": _hwcap(14),
    "rcpc": _hwcap(15),
    "dotprod": _hwcap(20),
    "sve": _hwcap(22),
    "fp16fml": _hwcap(23),
    "sve2": _hwcap2(1),
    "i8mm": _hwcap2(13),
    "bf16": _hwcap2(14),
}

PROBES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def probes(arch: str, features: Sequence[str]) -> tuple[tuple[str, Probe], ...]:
    """Each feature's name with its probe.

    Raises:
        TargetError: the library would not know how to ask for one of them, so it could not refuse
            a CPU without it.
    """
    known = PROBES.get(arch, {})
    unknown = [feature for feature in features if feature not in known]
    if unknown:
        raise TargetError(
            f"no way known to ask a CPU ({arch}) for {', '.join(unknown)}",
            hint=f"known features: {', '.join(known) or 'none'}; "
            "add the feature to backends/cpu_features.py.",
        )
    return tuple((feature, known[feature]) for feature in features)
