"""What a build did to the model, for people and for machines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.backends.target import Target
from graphopt.passes.manager import PassRecord
from graphopt.program.ir import Program


def size(nbytes: int) -> str:
    """A number of bytes for people: B, KB (1024) or MB."""
    if nbytes < 1024:
        return f"{nbytes} B"
    return f"{nbytes / 1024:.1f} KB" if nbytes < 1024**2 else f"{nbytes / 1024**2:.2f} MB"


@dataclass(frozen=True)
class Report:
    """Everything a build did.

    Attributes:
        name: the model's name.
        target: what it was built for.
        passes: what each pass changed and refused.
        program: the steps, their kernels and the memory plan.
        seconds: how long import, passes, lowering and code generation took.
        flash: bytes of the shared library, once it is linked.
    """

    name: str
    target: Target
    passes: tuple[PassRecord, ...]
    program: Program
    seconds: dict[str, float]
    flash: int | None = None

    def with_flash(self, nbytes: int) -> Report:
        """The report of the linked library."""
        return replace(self, flash=nbytes)

    def as_dict(self, *, times: bool = True) -> dict[str, Any]:
        """The report as plain data; without `times` equal builds give equal data."""
        passes = [record.as_dict() for record in self.passes]
        if not times:
            for entry in passes:
                del entry["seconds"]
        data: dict[str, Any] = {
            "name": self.name,
            "target": self.target.name,
            "passes": passes,
            "kernels": [
                {
                    "kernel": step.kernel.symbol,
                    "generator": step.kernel.origin,
                    "ops": list(step.ops),
                    "origin": list(step.origin),
                    "flops": step.flops,
                }
                for step in self.program.steps
            ],
            "memory": {
                "arena": self.program.arena,
                "scratch_per_thread": self.program.scratch,
                "weights": self.program.weights,
            },
        }
        if self.flash is not None:
            data["memory"]["flash"] = self.flash
        if times:
            data["seconds"] = dict(self.seconds)
        return data

    def __str__(self) -> str:
        """The report as text."""
        return "\n".join(
            [
                f"{self.name} for {self.target.name} ({self.target.description})",
                "",
                "passes",
                *_indented([str(record) for record in self.passes]),
                "",
                "kernels",
                *_indented(_kernel_lines(self.program)),
                "",
                "memory",
                *_indented(self._memory_lines()),
                "",
                "build time",
                *_indented([f"{what}: {time:.2f} s" for what, time in self.seconds.items()]),
            ]
        )

    def _memory_lines(self) -> list[str]:
        program = self.program
        lines = [
            f"weights: {size(program.weights)}",
            f"arena: {size(program.arena)}",
        ]
        if program.scratch:
            lines.append(f"scratch: {size(program.scratch)} per thread")
        if self.flash is not None:
            lines.insert(0, f"library: {size(self.flash)}")
        return lines


def _indented(blocks: Sequence[str]) -> list[str]:
    return [f"  {line}" for block in blocks for line in block.splitlines()]


def _kernel_lines(program: Program) -> list[str]:
    """One line per step: kernel, what is fused into it, where it comes from."""
    uses = Counter(step.kernel.symbol for step in program.steps)
    lines = [f"{len(program.steps)} steps, {len(uses)} different kernels"]
    for step in program.steps:
        where = step.origin[0] if step.origin else ""
        more = f" and {len(step.origin) - 1} more" if len(step.origin) > 1 else ""
        lines.append(
            f"{step.kernel.symbol} [{step.kernel.origin}]: {' + '.join(step.ops)}  ({where}{more})"
        )
    return lines
