"""Where a built model's time goes: what each step took, and what the manifest knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from graphopt.errors import ArtifactError

# The command line imports this file, and should not wait for numpy.
if TYPE_CHECKING:
    from graphopt.runtime.loader import Model

Order = Literal["time", "order"]


class Work(Protocol):
    """Something that took time to compute with and to move data."""

    @property
    def seconds(self) -> float:
        """How long it took."""
        ...

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        ...

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        ...


@dataclass(frozen=True)
class StepTime:
    """One step of a model and what it took.

    Attributes:
        number: its place in the order of steps, from 0.
        kernel: symbol of its kernel, without the model's prefix.
        generator: what generated the kernel, and its configuration.
        ops: the operators fused into it.
        origin: where in the user's model it comes from.
        tasks: how many tasks the threads share.
        flops: floating-point operations: a multiply-add is two, and a Winograd convolution counts
            as many as a direct one.
        read, written: bytes of the buffers it reads and writes, each once: what has to move at
            least where all of a buffer is used, however often a kernel comes back to it.
        seconds: the fastest of the runs.
    """

    number: int
    kernel: str
    generator: str
    ops: tuple[str, ...]
    origin: tuple[str, ...]
    tasks: int
    flops: int
    read: int
    written: int
    seconds: float

    @property
    def kind(self) -> str:
        """The generator's name."""
        return self.generator.split()[0]

    @property
    def configuration(self) -> str:
        """What the generator chose: tile sizes and the like."""
        return " ".join(self.generator.split()[1:])

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class KindTime:
    """All steps whose kernels one generator made."""

    kind: str
    steps: int
    flops: int
    moved: int
    seconds: float


def profile_steps(model: Model, repeats: int = 1) -> list[StepTime]:
    """Every step in order, each with the fastest of `repeats` runs on random inputs.

    Raises:
        ArtifactError: the build is from before steps said how many bytes they move.
        TargetError: the model runs under an emulator.
    """
    steps = model.manifest["steps"]
    if any("bytes_read" not in step for step in steps):
        raise ArtifactError(
            f"{model.folder} was built by an older graphopt, and lacks what a profile shows",
            hint="compile the model again.",
        )
    times = model.profile(repeats=repeats)
    return [
        StepTime(
            number=number,
            kernel=step["kernel"],
            generator=step["generator"],
            ops=tuple(step["ops"]),
            origin=tuple(step["origin"]),
            tasks=step["tasks"],
            flops=step["flops"],
            read=step["bytes_read"],
            written=step["bytes_written"],
            seconds=seconds,
        )
        for number, (step, (_, seconds)) in enumerate(zip(steps, times, strict=True))
    ]


def by_kind(steps: Sequence[StepTime]) -> list[KindTime]:
    """The steps added up by generator, slowest first."""
    kinds: dict[str, list[StepTime]] = {}
    for step in steps:
        kinds.setdefault(step.kind, []).append(step)
    sums = [
        KindTime(
            kind,
            len(members),
            sum(step.flops for step in members),
            sum(step.moved for step in members),
            sum(step.seconds for step in members),
        )
        for kind, members in kinds.items()
    ]
    return sorted(sums, key=lambda each: -each.seconds)


def chosen(steps: Sequence[StepTime], order: Order, limit: int | None) -> list[StepTime]:
    """The first `limit` steps (None: all), slowest first or in the order they run in."""
    if order == "time":
        steps = sorted(steps, key=lambda step: -step.seconds)
    return list(steps[:limit])


def gflops(work: Work) -> float:
    """10⁹ floating-point operations a second."""
    return work.flops / work.seconds / 1e9 if work.seconds else 0.0


def gbytes(work: Work) -> float:
    """10⁹ bytes read and written a second."""
    return work.moved / work.seconds / 1e9 if work.seconds else 0.0


def as_json(steps: Sequence[StepTime], order: Order, limit: int | None) -> dict[str, Any]:
    """The chosen steps and the sums of all by kind, as plain data."""
    total = sum(step.seconds for step in steps)

    def figures(work: Work) -> dict[str, Any]:
        return {
            "ms": work.seconds * 1e3,
            "share": work.seconds / total if total else 0.0,
            "flops": work.flops,
            "gflops_per_s": gflops(work),
            "gb_per_s": gbytes(work),
        }

    return {
        "ms": total * 1e3,
        "steps": [
            {
                "step": step.number,
                "kernel": step.kernel,
                "generator": step.generator,
                "ops": list(step.ops),
                "origin": list(step.origin),
                "tasks": step.tasks,
                "bytes_read": step.read,
                "bytes_written": step.written,
                **figures(step),
            }
            for step in chosen(steps, order, limit)
        ],
        "kinds": [
            {"kind": each.kind, "steps": each.steps, "bytes": each.moved, **figures(each)}
            for each in by_kind(steps)
        ],
    }


def chrome_trace(name: str, threads: int, steps: Sequence[StepTime]) -> dict[str, Any]:
    """The steps as a trace for chrome://tracing or Perfetto, laid end to end in their order.

    The format is Google's "Trace Event Format": complete events (`X`), times in microseconds.
    """
    place = {"pid": 1, "tid": 1}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "args": {"name": name}, **place},
        {"ph": "M", "name": "thread_name", "args": {"name": f"threads: {threads}"}, **place},
    ]
    start = 0.0
    for step in steps:
        events.append(
            {
                "ph": "X",
                "name": " + ".join(step.ops) or step.kernel,
                "cat": step.kind,
                "ts": start * 1e6,
                "dur": step.seconds * 1e6,
                "args": {
                    "step": step.number,
                    "kernel": step.kernel,
                    "generator": step.generator,
                    "origin": list(step.origin),
                    "tasks": step.tasks,
                    "flops": step.flops,
                    "bytes": step.moved,
                    "GFLOP/s": gflops(step),
                    "GB/s": gbytes(step),
                },
                **place,
            }
        )
        start += step.seconds
    return {"traceEvents": events, "displayTimeUnit": "ms"}
