"""`graphopt.tune`: measures the ways to make each kernel, and stores which is the fastest."""

from __future__ import annotations

import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from graphopt.backends.codegen import compile_kernels
from graphopt.backends.lower_alone import TunableKernel, lower_alone, tunable_kernels
from graphopt.backends.target import Target, cpu_flags, get_target, has_features
from graphopt.backends.toolchain import CompilerName, find_toolchain
from graphopt.backends.tuning import Entry, TuningDatabase, key_of
from graphopt.errors import TargetError
from graphopt.importers import ExampleInputs, import_model
from graphopt.passes.base import Context
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.devices import Device, EmulatorDevice, LocalDevice
from graphopt.runtime.loader import Array

Progress = Callable[[str], None]
"""Is told what begins: `import`, `passes`, then each kernel as `3/17 conv_direct 16×6 at …`."""

_ROUNDS = 6
_CALL_SECONDS = 0.02
"""Time of the runs of one candidate in one round, about."""
_SLOWER = 1.15
"""A candidate this much slower than the best is not measured on."""
_NOISE = 0.03
"""What a candidate must win over the default, in the minimum and in the median."""


@dataclass(frozen=True)
class TunedKernel:
    """A kernel that was measured: its key in the database, where it is from, and the result."""

    key: str
    origin: tuple[str, ...]
    entry: Entry


@dataclass(frozen=True)
class Tuned:
    """What `tune` did.

    Attributes:
        database: all entries, those of before too.
        measured: the kernels measured now, in order.
        known: how many kernels the database knew already.
        left: how many were left for lack of time.
    """

    database: TuningDatabase
    measured: tuple[TunedKernel, ...]
    known: int
    left: int


class _TimeIsUpError(Exception):
    """The kernel that is being measured stays untuned."""


@dataclass
class _Candidate:
    """A candidate that is built, and the seconds of its runs so far."""

    name: str
    folder: Path
    inputs: Sequence[Array]
    copies: int
    repeats: int = 1
    seconds: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """Its fastest run."""
        return min(self.seconds, default=math.inf)


def tune(
    model: object,
    inputs: ExampleInputs = None,
    *,
    database: str | Path,
    target: str | Target = "host",
    device: Device | None = None,
    seconds: float | None = None,
    threads: int = 1,
    cc: CompilerName | None = None,
    progress: Progress | None = None,
) -> Tuned:
    """Measure the configurations of a model's kernels on a device, and store the fastest.

    For every different kernel that the database does not know yet, those that take the longest
    first, every candidate is built and run alone, in turn with the others. Another one than the
    cost model's is stored only if it wins by more than the noise, twice. The file is written after
    every kernel, so an interrupted run can be continued. `compile(..., tune=database)` uses it.

    Args:
        model: what `compile` takes.
        inputs: likewise.
        database: the file to add to; made if missing.
        target: what is built for.
        device: where to measure (None: this machine, which must be able to run it).
        seconds: stop after this time and leave the rest untuned (None: no limit).
        threads: threads to measure with.
        cc: C compiler to link with.
        progress: is told what begins.

    Raises:
        TargetError: the target's code runs under an emulator only here.
        TuningError: the database cannot be read or written.
        GraphoptError: see `compile`.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    chosen = get_target(target)
    say = progress or (lambda _: None)
    _check_device(chosen, device)
    path = Path(database)
    known = TuningDatabase.load(path) if path.exists() else TuningDatabase()
    find_toolchain(chosen, cc)
    with torch.no_grad(), tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        say("import")
        graph = import_model(model, inputs)
        say("passes")
        run_passes(graph, resolve(None), Context())
        kernels = tunable_kernels(graph, chosen)
        todo = [each for each in kernels if key_of(each.alternatives, chosen) not in known]
        bench = _Bench(chosen, device or LocalDevice(cc=cc, cache=Path(folder)), threads, cc, end)
        measured: list[TunedKernel] = []
        for number, kernel in enumerate(todo, start=1):
            if time.monotonic() >= end:
                break
            key = key_of(kernel.alternatives, chosen)
            say(f"{number}/{len(todo)} {_describe(kernel)}")
            try:
                entry = bench.measure(kernel)
            except _TimeIsUpError:
                break
            measured.append(TunedKernel(key, kernel.origin, entry))
            _store(known, key, entry, path)
    left = len(todo) - len(measured)
    return Tuned(known, tuple(measured), len(kernels) - len(todo), left)


def _check_device(target: Target, device: Device | None) -> None:
    """Guard: what is measured is the CPU, not an emulator of it."""
    here = target.arch == platform.machine() and has_features(target.features, cpu_flags())
    if isinstance(device, EmulatorDevice) or (device is None and not here):
        raise TargetError(
            f"{target.name} cannot be tuned here: its code would run under an emulator, whose "
            "times mean nothing",
            hint="run `graphopt tune` on the board, and compile with the file that it writes.",
        )


def _describe(kernel: TunableKernel) -> str:
    origin = kernel.origin
    where = f" at {origin[0]}" if origin else ""
    count = len(kernel.alternatives.candidates)
    return f"{kernel.alternatives.candidates[0].name} and {count - 1} others{where}"


def _store(database: TuningDatabase, key: str, entry: Entry, path: Path) -> None:
    """Add an entry and write the file, with what others wrote to it meanwhile."""
    database[key] = entry
    if path.exists():
        database.merge(TuningDatabase.load(path))
    database.save(path)


def _cpu_name() -> str:
    """This machine's CPU as it calls itself."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        # x86 has a numeric `model` besides.
        if key.strip().lower() in ("model name", "model") and not value.strip().isdecimal():
            return value.strip()
    return platform.machine()


@dataclass(frozen=True)
class _Bench:
    """Where and until when candidates are measured."""

    target: Target
    device: Device
    threads: int
    cc: CompilerName | None
    end: float

    def measure(self, kernel: TunableKernel) -> Entry:
        """What is to be stored of a kernel.

        Raises:
            _TimeIsUpError: there is no time for it.
        """
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            default, *others = (
                self._build(kernel, each.name, Path(folder) / str(number))
                for number, each in enumerate(kernel.alternatives.candidates)
            )
            self._rounds(default, others)
            winner = min(others, key=lambda each: each.best)
            if _is_faster(winner, default):
                # The best of many is lucky, too: it has to win again, alone.
                winner.seconds, default.seconds = [], []
                self._rounds(default, [winner])
        chosen = winner if _is_faster(winner, default) else default
        device = _cpu_name() if isinstance(self.device, LocalDevice) else str(self.device)
        return Entry(chosen.name, chosen.best, default.name, default.best, device, self.threads)

    def _build(self, kernel: TunableKernel, name: str, folder: Path) -> _Candidate:
        self._check_time()
        program = lower_alone(kernel, self.target, name)
        code = compile_kernels(program, self.target)
        build_artifact(program, self.target, code, folder, cc=self.cc, threads=self.threads)
        random = np.random.default_rng(0)
        buffers = [program.buffers[name] for name in program.inputs]
        inputs = [random.standard_normal(each.shape).astype(each.dtype) for each in buffers]
        return _Candidate(name, folder, inputs, len(program.steps))

    def _rounds(self, default: _Candidate, others: Sequence[_Candidate]) -> None:
        """Run the candidates in turn; those that fall behind do not run to the end."""
        running = [default, *others]
        for _ in range(_ROUNDS):
            for each in running:
                self._check_time()
                self._run(each)
            best = min(each.best for each in running)
            running = [each for each in running if each is default or each.best <= _SLOWER * best]
            if len(running) == 1:
                return

    def _run(self, candidate: _Candidate) -> None:
        times = self.device.time(
            candidate.folder, candidate.inputs, repeats=max(3, candidate.repeats), warmup=1,
            threads=self.threads,
        )  # fmt: skip
        candidate.seconds += [run / candidate.copies for run in times]
        candidate.repeats = min(1000, int(_CALL_SECONDS / max(min(times), 1e-9)))

    def _check_time(self) -> None:
        if time.monotonic() >= self.end:
            raise _TimeIsUpError


def _is_faster(winner: _Candidate, default: _Candidate) -> bool:
    """Whether one won by more than the noise, in its fastest run and in the usual one."""
    return all(
        of(winner.seconds) < (1 - _NOISE) * of(default.seconds) for of in (min, statistics.median)
    )
