"""The process that holds one system with one model; `contest.py` starts it and talks to it.

One line of JSON each way at a time. In: which runner of `runners.py`, its source, the inputs.
Out: `{"ready": true}` once it has run, its outputs being in a file, or `{"error": "..."}`.
Then `{"count": 5}` is answered with `{"seconds": [...]}` as often as asked.

It is started as a module from the repository's root: a script has its folder on the path, where
`bench/kernels.py` passes for the package of that name that transformers looks for.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import numpy as np

from bench import runners


def prepare(request: dict[str, Any]) -> runners.Run:
    """Load the model, run it once, and write what it gave."""
    with np.load(request["inputs"]) as stored:
        inputs = dict(zip(request["names"], (stored[key] for key in stored.files), strict=True))
    make = getattr(runners, request["runner"])
    run: runners.Run = make(request["source"], inputs, request["threads"])
    np.savez(request["outputs"], *run())
    return run


def measure(run: runners.Run, count: int) -> list[float]:
    """Seconds of `count` runs, after one that wakes threads and warms caches."""
    run()
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return seconds


def main() -> None:
    # Some systems print: what they print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        run = prepare(json.loads(sys.stdin.readline()))
    except Exception as error:
        answer({"error": f"{type(error).__name__}: {error}"})
        raise SystemExit(1) from None
    answer({"ready": True})
    for line in sys.stdin:
        answer({"seconds": measure(run, json.loads(line)["count"])})


if __name__ == "__main__":
    main()
