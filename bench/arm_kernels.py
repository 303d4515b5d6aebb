"""How good is the Arm code? Its hottest loops, and what LLVM's model of each core makes of them.

    python bench/arm_kernels.py [KERNEL...] [--core cortex-a72] [--check] [--json] [--show]

Each kernel is compiled as a model's would be, the loop with most vector multiply-adds is found in
its assembly, and `llvm-mca` is asked how many cycles a turn takes with all in its first cache:
at least, by the busiest unit (`bound`), and in a simulation. The aims: nothing spilled, 75 % of the
instructions multiply-adds (less where loads do not allow it: printed with the reason), 80 % of the
peak. With `--check` the status is 1 where a loop misses one. Winograd's transforms are shown
without an aim: a tile of 6×6 vectors does not fit the registers.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from torch import fx

from graphopt.backends.target import get_target
from tests.backends.harness import Builder, aten
from tests.backends.loops import Layer, Loop, assembly_of, loops_of, product_loops

FMA_AIM = 0.75
"""Least share of multiply-adds among a loop's instructions."""
PEAK_AIM = 0.80
"""Least share of the peak, where llvm-mca simulates the core."""
INSTALL = (
    "install llvm-mca 17 or later, whose models include the Neoverse N1: `apt install llvm-19`"
)


@dataclass(frozen=True)
class Core:
    """A core and what its vector units can do.

    Attributes:
        peak: 128-bit multiply-adds a cycle, by the core's optimization guide.
        options: what makes llvm-mca model it.
        simulates: whether llvm-mca's simulation means anything.
    """

    peak: float
    options: tuple[str, ...]
    simulates: bool = True


# The peaks are checked against llvm-mca's models before anything is measured.
#
# A53: one 128-bit FMLA a cycle. llvm-mca lets a core in order write nothing before an older
# instruction's result, so that each load waits for the multiply-add before it: its simulation is no
# use. The bound is a high one: it leaves out that 128-bit loads issue alone, for two cycles.
#
# A72: two 64-bit pipes, F0 and F1; a 128-bit FMLA takes both (Cortex-A72 Software Optimization
# Guide, UAN 0016A). LLVM takes its model of the A57 for it.
#
# A76: two 128-bit pipes, and 8 micro-operations dispatched a cycle (Cortex-A76 Software
# Optimization Guide, PJDOC-466751330-7215). LLVM has no model of it and schedules as for the A57;
# the Neoverse N1 is the same core for servers, but LLVM's model of that dispatches 3.
CORES = {
    "cortex-a53": Core(1, ("-mcpu=cortex-a53",), simulates=False),
    "cortex-a72": Core(1, ("-mcpu=cortex-a72",)),
    "cortex-a76": Core(2, ("-mcpu=neoverse-n1", "-dispatch=8")),
}


@dataclass(frozen=True)
class Case:
    """One kernel to look at.

    Attributes:
        make: the layer.
        shape: shape of that input.
        blocked: whether the layers before and behind it work on blocks of channels, as inside a
            network.
        winograd: whether Winograd is allowed.
        strassen: whether Strassen is.
        expand: whether no cache holds an image.
        loop: `product` for the loop with most multiply-adds, or `transform` and which one.
        fma_share: least share of multiply-adds among the loop's instructions.
        limit: why it is less than elsewhere.
    """

    make: Layer
    shape: tuple[int, ...]
    blocked: tuple[bool, bool] = (True, True)
    winograd: bool = False
    strassen: bool = False
    expand: bool = False
    loop: str = "product"
    fma_share: float = FMA_AIM
    limit: str = ""


def conv(channels: int, kernel: int, **options: Any) -> Layer:
    return lambda b, x: b.conv(x, channels, (kernel, kernel), **options)


def linear(columns: int) -> Layer:
    def make(b: Builder, x: fx.Node) -> fx.Node:
        rows = x.meta["val"].shape[-1]
        weight = b.constant(b.random(columns, rows) / rows**0.5)
        return b.op(aten.linear.default, x, weight, b.constant(b.random(columns)))

    return make


def expanded(b: Builder, x: fx.Node) -> fx.Node:
    wide = b.op(aten.hardswish.default, b.conv(x, 96, (1, 1)))
    return b.conv(wide, 96, (3, 3), padding=1, stride=2, groups=96)


def attention(b: Builder, x: fx.Node) -> fx.Node:
    return b.op(aten.scaled_dot_product_attention.default, x, x, x)


PLAIN, PLAIN_IN = (False, False), (False, True)

CASES = {
    "conv 3×3": Case(conv(64, 3, padding=1), (1, 64, 56, 56)),
    "conv 3×3 stride 2": Case(conv(128, 3, padding=1, stride=2), (1, 64, 56, 56)),
    "conv 3×3 image": Case(conv(32, 3, padding=1, stride=2), (1, 3, 224, 224), blocked=PLAIN_IN),
    "conv 7×7 image": Case(conv(64, 7, padding=3, stride=2), (1, 3, 224, 224), blocked=PLAIN_IN),
    "patches 16×16": Case(conv(192, 16, stride=16), (1, 3, 224, 224), blocked=PLAIN_IN),
    "conv 1×1": Case(conv(96, 1), (1, 64, 28, 28)),
    "conv 1×1 to 24": Case(conv(24, 1), (1, 96, 56, 56)),
    "depthwise 3×3": Case(conv(96, 3, padding=1, groups=96), (1, 96, 56, 56)),
    "depthwise 3×3 stride 2": Case(
        conv(96, 3, padding=1, stride=2, groups=96),
        (1, 96, 56, 56),
        fma_share=0.60,
        limit="loads: each pixel reads two columns that the one before does not, a load of a pair "
        "for every 3 multiply-adds, and weights besides; 10 pixels, all the registers, make 69 %",
    ),
    "expand 1×1": Case(expanded, (1, 16, 112, 112), expand=True),
    "winograd product": Case(conv(64, 3, padding=1), (1, 64, 56, 56), winograd=True),
    "winograd stride 2": Case(conv(128, 3, padding=1, stride=2), (1, 64, 56, 56), winograd=True),
    "winograd 7×7 image": Case(
        conv(64, 7, padding=3, stride=2), (1, 3, 224, 224), PLAIN_IN, winograd=True
    ),
    "winograd input": Case(conv(64, 3), (1, 64, 58, 58), winograd=True, loop="transform 0"),
    "winograd output": Case(conv(64, 3), (1, 64, 58, 58), winograd=True, loop="transform 1"),
    "linear M=128": Case(linear(384), (128, 384), blocked=PLAIN),
    "conv 3×3 deep": Case(conv(512, 3, padding=1, stride=2), (1, 512, 14, 14)),
    "linear M=128 deep": Case(linear(3072), (128, 768), blocked=PLAIN),
    "strassen M=128": Case(linear(3072), (1, 128, 768), blocked=PLAIN, strassen=True),
    "strassen 1×1": Case(conv(256, 1), (1, 1024, 14, 14), strassen=True),
    "linear M=1": Case(
        linear(1000),
        (1, 1280),
        blocked=PLAIN,
        fma_share=0.60,
        limit="loads: each weight is used once, a load of a pair for every 2 multiply-adds",
    ),
    "attention": Case(attention, (1, 12, 128, 32), blocked=PLAIN),
}


@dataclass(frozen=True)
class Result:
    """What was found out about one kernel on one core; the shares are of the core's peak."""

    kernel: str
    core: str
    generator: str
    instructions: int
    multiply_adds: int
    loads: int
    spills: int
    cycles: float | None
    bound_share: float
    simulated_share: float | None
    misses: tuple[str, ...]


def hot_loop(case: Case, text: str) -> Loop:
    """The loop the case is about."""
    kind, _, number = case.loop.partition(" ")
    if kind == "product":
        # Of equal ones the worst: borders have code of their own. What also subtracts is Strassen's
        # first register tile, which forms weights for the others.
        def order(loop: Loop) -> tuple[int, int, int]:
            others = loop.multiply_adds - loop.arithmetic
            return loop.multiply_adds, others, len(loop.instructions)

        return max(product_loops(text), key=order)
    # In the order they run in; the product only multiplies and adds at once.
    transforms = [loop for loop in loops_of(text) if loop.arithmetic - loop.multiply_adds > 20]
    return transforms[int(number)]


def find_mca() -> str:
    """The newest llvm-mca. Ends the program where there is none."""
    names = [*(f"llvm-mca-{version}" for version in range(40, 16, -1)), "llvm-mca"]
    for name in names:
        if shutil.which(name):
            return name
    sys.exit(INSTALL)


def cycles_of(mca: str, core: Core, instructions: Iterable[str]) -> tuple[float, float]:
    """Cycles a turn takes: by the busiest unit alone, and simulated over 100 turns."""
    done = subprocess.run(
        [mca, "-mtriple=aarch64-linux-gnu", *core.options, "-iterations=100", "-json"],
        input="\n".join(instructions),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{mca}: {done.stderr.strip()}")
    summary = json.loads(done.stdout)["CodeRegions"][0]["SummaryView"]
    return summary["BlockRThroughput"], summary["TotalCycles"] / summary["Iterations"]


def check_peaks(mca: str) -> None:
    """Guard: llvm-mca's models have the peaks of `CORES`."""
    probe = [f"fmla v{i}.4s, v30.4s, v31.s[0]" for i in range(16)]
    for name, core in CORES.items():
        bound, _ = cycles_of(mca, core, probe)
        if abs(len(probe) / bound - core.peak) > 0.01:
            sys.exit(
                f"{mca} gives the {name} {len(probe) / bound:g} multiply-adds a cycle, not "
                f"{core.peak:g}: {INSTALL}"
            )


def measure(name: str, core: str, mca: str) -> tuple[Result, Loop]:
    case = CASES[name]
    generator, text = assembly_of(case.make, case.shape, get_target(core), blocked=case.blocked,
                                  winograd=case.winograd, strassen=case.strassen,
                                  expand=case.expand)  # fmt: skip
    loop = hot_loop(case, text)
    bound, simulated = cycles_of(mca, CORES[core], loop.instructions)
    cycles = simulated if CORES[core].simulates else None
    is_product = case.loop == "product"
    useful = loop.multiply_adds if is_product else loop.arithmetic
    least = useful / CORES[core].peak
    misses = []
    if is_product and loop.spills:
        misses.append("spills")
    if is_product and useful < case.fma_share * len(loop.instructions):
        misses.append(f"under {case.fma_share:.0%} multiply-adds")
    if is_product and cycles and least < PEAK_AIM * cycles:
        misses.append(f"under {PEAK_AIM:.0%} of the peak")
    loads = loop.count(r"ldu?[rp]|ld1")
    result = Result(name, core, generator, len(loop.instructions), useful, loads, loop.spills,
                    cycles, least / bound, least / cycles if cycles else None,
                    tuple(misses))  # fmt: skip
    return result, loop


def table(results: list[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("kernel", "core", "generator", "instructions", "FMA", "share", "loads",
                   "spills", "cycles", "of peak: bound", "simulated", "misses"):  # fmt: skip
        words = column in ("kernel", "core", "generator", "misses")
        table.add_column(column, justify="left" if words else "right")
    for each in results:
        table.add_row(
            each.kernel,
            each.core,
            each.generator,
            str(each.instructions),
            str(each.multiply_adds),
            f"{each.multiply_adds / each.instructions:.0%}",
            str(each.loads),
            str(each.spills),
            f"{each.cycles:.0f}" if each.cycles else "",
            f"{each.bound_share:.0%}",
            f"{each.simulated_share:.0%}" if each.simulated_share else "",
            ", ".join(each.misses),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=", ".join(CASES))
    parser.add_argument("--core", action="append", choices=list(CORES), help="default: all")
    parser.add_argument("--check", action="store_true", help="status 1 where something misses")
    parser.add_argument("--json", action="store_true", help="print one JSON value and no table")
    parser.add_argument("--show", action="store_true", help="print the loops' instructions too")
    options = parser.parse_args()
    unknown = sorted(set(options.kernels) - set(CASES))
    if unknown:
        parser.error(f"no such kernel: {', '.join(unknown)}")
    mca = find_mca()
    check_peaks(mca)
    results = []
    for name in options.kernels or CASES:
        for core in options.core or CORES:
            result, loop = measure(name, core, mca)
            results.append(result)
            if options.show:
                print(f"{name} on {core}", *loop.instructions, sep="\n  ")
    if options.json:
        print(json.dumps([asdict(each) for each in results], indent=1))
    else:
        Console(width=None if sys.stdout.isatty() else 180).print(table(results))
        for name in dict.fromkeys(each.kernel for each in results if CASES[each.kernel].limit):
            case = CASES[name]
            print(
                f"{name}: {case.fma_share:.0%} multiply-adds are the aim, limited by {case.limit}"
            )
    missed = [each for each in results if each.misses]
    print(f"{len(missed)} of {len(results)} loops miss an aim", file=sys.stderr)
    if options.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
