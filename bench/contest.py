"""Times several systems in turn on the same inputs, each in a process and a Python of its own.

Taking turns, a slow moment of the machine hits all of them. While one runs the others are stopped
(SIGSTOP), so that no thread of theirs that waits for work takes its cores. A process is pinned to
as many cores as it may use threads.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench-out"

_ANSWER_LIMIT = 900.0
"""Seconds until a system that does not answer is given up: torch.compile may take minutes."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Contestant:
    """One system with one model.

    Args:
        label: what the table calls it.
        runner: the function of `runners.py` that loads and runs it.
        source: what the runner loads: a folder, a file, or a name.
        python: the interpreter that has the system installed.
    """

    label: str
    runner: str
    source: str
    python: str = sys.executable


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run, and the outputs of the first."""

    seconds: tuple[float, ...]
    outputs: tuple[np.ndarray, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float]:
        return {
            "min_ms": self.best * 1e3,
            "median_ms": self.median * 1e3,
            "runs": len(self.seconds),
        }


@dataclass(frozen=True)
class Failure:
    """Why a system could not load or run the model."""

    reason: str


class WorkerError(Exception):
    """A worker reported an error, or its process ended."""


class Worker:
    """The process of one contestant (`worker.py`); stopped except while it is asked something.

    Raises:
        WorkerError: from `start` and `measure`, when the system fails.
    """

    def __init__(self, contestant: Contestant, folder: Path, threads: int) -> None:
        self.contestant = contestant
        self.threads = threads
        self._outputs = folder / f"{contestant.label}.npz"
        self._messages = folder / f"{contestant.label}.log"
        cores = sorted(os.sched_getaffinity(0))[:threads]
        with self._messages.open("wb") as messages:
            self._process = subprocess.Popen(
                [contestant.python, "-m", "bench.worker"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            )
        os.sched_setaffinity(self._process.pid, cores)  # While it has one thread still.

    def start(self, inputs: Path, names: Sequence[str]) -> None:
        """Let it load the model and run once."""
        self._ask(
            {
                "runner": self.contestant.runner,
                "source": self.contestant.source,
                "inputs": str(inputs),
                "names": list(names),
                "outputs": str(self._outputs),
                "threads": self.threads,
            }
        )

    def measure(self, count: int) -> list[float]:
        """Seconds of `count` runs."""
        seconds: list[float] = self._ask({"count": count})["seconds"]
        return seconds

    def outputs(self) -> tuple[np.ndarray, ...]:
        """What its first run gave."""
        with np.load(self._outputs) as stored:
            return tuple(stored[key] for key in stored.files)

    def end(self) -> None:
        """End the process; it may be stopped."""
        self._process.kill()
        self._process.communicate()

    def _ask(self, message: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        limit = threading.Timer(_ANSWER_LIMIT, self._process.kill)
        limit.start()
        try:
            self._process.send_signal(signal.SIGCONT)
            print(json.dumps(message), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            self._process.send_signal(signal.SIGSTOP)
        except BrokenPipeError:
            line = ""
        finally:
            limit.cancel()
        if not line:
            raise WorkerError(
                f"its process ended with {self._process.wait()}: {self._last_words()}"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        lines = self._messages.read_text(errors="replace").split("\n")
        return "; ".join([line.strip() for line in lines if line.strip()][-3:]) or "no message"


def contest(
    contestants: Sequence[Contestant],
    inputs: Arrays,
    *,
    threads: int,
    seconds: float = 2.0,
    rounds: int = 10,
) -> dict[str, Times | Failure]:
    """Outcomes by label: `rounds` turns each, about `seconds` of running for each in all."""
    outcomes: dict[str, Times | Failure] = {}
    workers: dict[str, Worker] = {}
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="graphopt-contest-") as temporary:
        folder = Path(temporary)
        stored = folder / "inputs.npz"
        np.savez(stored, *inputs.values())
        try:
            counts: dict[str, int] = {}
            for contestant in contestants:
                label = contestant.label
                workers[label] = Worker(contestant, folder, threads)
                try:
                    workers[label].start(stored, list(inputs))
                    once = min(workers[label].measure(2))
                except WorkerError as error:
                    outcomes[label] = Failure(str(error))
                    continue
                counts[label] = max(1, min(200, int(seconds / rounds / once)))
                times[label] = []
            for turn in range(rounds):
                # To and fro, so that nobody always comes after the same one.
                for label in list(times)[:: -1 if turn % 2 else 1]:
                    try:
                        times[label] += workers[label].measure(counts[label])
                    except WorkerError as error:
                        outcomes[label] = Failure(str(error))
                        del times[label]
            for label, each in times.items():
                outcomes[label] = Times(tuple(each), workers[label].outputs())
        finally:
            for worker in workers.values():
                worker.end()
    return {contestant.label: outcomes[contestant.label] for contestant in contestants}


def all_times(outcomes: dict[str, Times | Failure]) -> dict[str, Times]:
    """The outcomes of a contest in which nobody may fail.

    Raises:
        RuntimeError: somebody did.
    """
    times = {}
    for label, outcome in outcomes.items():
        if isinstance(outcome, Failure):
            raise RuntimeError(f"{label}: {outcome.reason}")
        times[label] = outcome
    return times
