"""The loops of compiled kernels: which instructions they hold, and what is spilled in them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from torch import fx

from graphopt.backends.codegen import assembly
from graphopt.backends.lower import lower
from graphopt.backends.target import Target
from tests.backends.harness import Builder, aten

Layer = Callable[[Builder, fx.Node], fx.Node]
"""Adds a layer to a graph, given its input."""


@dataclass(frozen=True)
class Loop:
    """A loop of a function of x86-64 or 64-bit Arm.

    Attributes:
        label: where it begins.
        instructions: its own, those of inner loops left out.
        innermost: whether there is no loop inside.
    """

    label: str
    instructions: tuple[str, ...]
    innermost: bool

    def count(self, pattern: str) -> int:
        """Instructions that begin so."""
        return sum(re.match(pattern, each) is not None for each in self.instructions)

    @property
    def multiply_adds(self) -> int:
        """Vector multiply-adds; with SSE, which has none, products."""
        return self.count(r"fml[as]\tv\d+\.4s|vfn?m(add|sub)\d+ps|mulps")

    @property
    def arithmetic(self) -> int:
        """All vector arithmetic on floats, but for the sums of SSE's products."""
        others = self.count(r"f(add|sub|mul|neg|div)\tv\d+\.4s|v(add|mul)ps|v?(sub|div|min|max)ps")
        return self.multiply_adds + others

    @property
    def spills(self) -> int:
        """Loads and stores of vector registers on the stack."""
        return self.count(r"(ld|st)u?[rp]\t[qvds]\d+.*\[sp|v?[a-z]\w*\t.*%[xyz]mm.*\(%rsp\)"
                          r"|v?[a-z]\w*\t.*\(%rsp\).*%[xyz]mm")  # fmt: skip


def loops_of(text: str) -> Iterator[Loop]:
    """Every loop of some assembly, found by the branches that go back to a label."""
    lines = text.splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"[.\w$]+:", line)}
    spans = set()
    for i, line in enumerate(lines):
        branch = re.fullmatch(r"\t(?:b(?:\.\w+)?|cbn?z|tbn?z|j\w+)\t(?:.*, )?(\.LBB\w+)", line)
        if branch and labels[branch[1]] < i:
            spans.add((labels[branch[1]], i))
    for first, last in sorted(spans):
        inside = [s for s in spans if s != (first, last) and first <= s[0] and s[1] <= last]
        own = [
            line.strip()
            for i, line in enumerate(lines[first : last + 1], first)
            if re.match(r"\t[a-z]", line) and not any(a <= i <= b for a, b in inside)
        ]
        yield Loop(lines[first][:-1], tuple(own), innermost=not inside)


def product_loops(text: str) -> list[Loop]:
    """The innermost loops that multiply and add. Epilogues may add a little to them."""
    return [
        loop
        for loop in loops_of(text)
        if loop.innermost and 0 < loop.arithmetic <= 1.25 * loop.multiply_adds
    ]


def assembly_of(
    layer: Layer, shape: tuple[int, ...], target: Target, *,
    blocked: tuple[bool, bool] = (True, True), winograd: bool = False, strassen: bool = False,
    expand: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """A layer's kernel: what generated it, and its assembly.

    Args:
        layer: an anchor, and its epilogue.
        shape: its input's.
        target: what to compile for.
        blocked: whether the layers before and behind it work on blocks of channels, as inside a
            network.
        winograd: whether Winograd is allowed.
        strassen: whether Strassen is.
        expand: whether no cache holds an image, so that depthwise convolutions make it themselves.
    """
    target = replace(target, last_bytes=target.l2_bytes if expand else 1 << 40)
    b = Builder()
    n, channels, *rest = shape
    before, behind = blocked
    point = (1,) * len(rest)
    x = b.input(b.random(n, 8, *rest) if before else b.random(*shape))
    if before:
        x = b.op(aten.relu.default, b.conv(x, channels, point))
    y = layer(b, x)
    b.returns(b.conv(b.op(aten.relu.default, y), 8, point) if behind else y)
    program = lower(b.finish(), target, "layer", winograd=winograd, strassen=strassen)
    step = program.steps[1 if before else 0]
    return step.kernel.origin, assembly(replace(program, steps=(step,)), target)
