"""Planning the arena: which tensors share memory, and where each one lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.program.ir import ALIGNMENT


@dataclass(frozen=True)
class Lifetime:
    """An arena tensor: needed from step `first` to step `last`, both included."""

    name: str
    nbytes: int
    first: int
    last: int


def round_up(nbytes: int) -> int:
    """The next multiple of the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def plan_offsets(lifetimes: Sequence[Lifetime]) -> tuple[dict[str, int], int]:
    """An offset for each tensor such that no two live at the same step overlap.

    Tensors are placed largest first, each at the lowest gap that fits among those it lives beside
    (greedy by size; Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net
    Inference", 2020).

    Returns:
        the offsets by name, and the arena's size in bytes.
    """
    placed: list[tuple[int, Lifetime]] = []
    offsets: dict[str, int] = {}
    total = 0
    for tensor in sorted(lifetimes, key=lambda t: (-t.nbytes, t.first, t.name)):
        size = round_up(tensor.nbytes)
        beside = sorted(
            (offset, round_up(other.nbytes))
            for offset, other in placed
            if other.first <= tensor.last and tensor.first <= other.last
        )
        at = 0
        for offset, taken in beside:
            if at + size <= offset:
                break
            at = max(at, offset + taken)
        placed.append((at, tensor))
        offsets[tensor.name] = at
        total = max(total, at + size)
    return offsets, total


def largest_live(lifetimes: Sequence[Lifetime], sizes: Mapping[str, int] | None = None) -> int:
    """The largest sum of bytes live at one step: no arena can be smaller."""
    steps = max((t.last for t in lifetimes), default=-1) + 1
    return max(
        (
            sum(round_up((sizes or {}).get(t.name, t.nbytes))
                for t in lifetimes if t.first <= step <= t.last)
            for step in range(steps)
        ),
        default=0,
    )  # fmt: skip
