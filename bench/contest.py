"""Times several runtimes in turn on the same inputs, each in a process of its own.

Taking turns, a slow moment of the machine hits all of them; separate processes keep one runtime's
waiting threads off the other's cores. A process is pinned to as many cores as it may use threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench-out"

Arrays = dict[str, np.ndarray]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Contestant:
    """One runtime with one model.

    Args:
        label: what the table calls it.
        make: a module-level function (source, inputs, threads) → a function that runs once.
        source: what `make` loads: a folder, a file, or a name in the zoo.
    """

    label: str
    make: Callable[[Any, Arrays, int], Run]
    source: Any


@dataclass(frozen=True)
class Times:
    """Seconds of every counted run."""

    seconds: tuple[float, ...]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_dict(self) -> dict[str, float]:
        return {"min_ms": self.best * 1e3, "median_ms": self.median * 1e3}


def graphopt_runner(folder: str, inputs: Arrays, threads: int) -> Run:
    """A folder that graphopt built."""
    import graphopt

    model = graphopt.load(folder, threads)
    arrays = tuple(inputs.values())
    return lambda: model(*arrays)


def onnxruntime_runner(path: str, inputs: Arrays, threads: int) -> Run:
    """An ONNX file in ONNX Runtime with all its optimizations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # Errors only.
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, inputs)


def torch_runner(name: str, inputs: Arrays, threads: int) -> Run:
    """A model of the zoo in PyTorch as it is (eager)."""
    import torch

    from tests.models import zoo

    torch.set_num_threads(threads)
    model = zoo.MODELS[name].model()
    tensors = [torch.from_numpy(array) for array in inputs.values()]

    def run() -> Any:
        with torch.inference_mode():
            return model(*tensors)

    return run


def _work(
    connection: Connection, contestant: Contestant, inputs: Arrays, threads: int, paths: list[str]
) -> None:
    sys.path[:] = paths
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= threads:
        os.sched_setaffinity(0, cores[:threads])
    try:
        run = contestant.make(contestant.source, inputs, threads)
        run()
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send(None)
    while count := connection.recv():
        run()  # Wakes threads that went to sleep while the others ran.
        seconds = []
        for _ in range(count):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        connection.send(seconds)


def _answer(label: str, process: SpawnProcess, pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{label}: its process ended with {process.exitcode}") from None


def contest(
    contestants: Sequence[Contestant],
    inputs: Arrays,
    *,
    threads: int,
    seconds: float = 2.0,
    rounds: int = 10,
) -> dict[str, Times]:
    """Times by label: `rounds` turns each, about `seconds` of running for each in all.

    Raises:
        RuntimeError: a contestant cannot run the model.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for contestant in contestants:
            here, there = context.Pipe()
            arguments = (there, contestant, inputs, threads, sys.path)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            started.append((contestant.label, process, here))
        counts = {}
        for label, process, pipe in started:
            problem = _answer(label, process, pipe)
            if problem:
                raise RuntimeError(f"{label}: {problem}")
        for label, process, pipe in started:
            pipe.send(2)
            once = min(_answer(label, process, pipe))
            counts[label] = max(1, min(200, int(seconds / rounds / once)))
        times: dict[str, list[float]] = {label: [] for label, _, _ in started}
        for _ in range(rounds):
            for label, process, pipe in started:
                time.sleep(0.02)  # The one before lets its threads go to sleep.
                pipe.send(counts[label])
                times[label] += _answer(label, process, pipe)
        return {label: Times(tuple(each)) for label, each in times.items()}
    finally:
        for _, process, pipe in started:
            # One that failed hears nothing any more.
            with contextlib.suppress(OSError):
                pipe.send(0)
            process.join(5)
            process.terminate()
            pipe.close()
