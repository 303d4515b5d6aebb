"""Planning the arena: which tensors share memory, and where each one lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.program.ir import ALIGNMENT, Buffer, Step


@dataclass(frozen=True)
class Lifetime:
    """An arena tensor: needed from step `first` to step `last`, both included."""

    name: str
    nbytes: int
    first: int
    last: int


def lifetimes_of(steps: Sequence[Step], buffers: Mapping[str, Buffer]) -> dict[str, Lifetime]:
    """From which step to which each arena tensor is needed, by name, in order of first use.

    Pieces of a tensor count as the tensor.
    """
    found: dict[str, Lifetime] = {}
    for i, step in enumerate(steps):
        for arg in step.args:
            name = buffers[arg].within or arg
            if buffers[name].role == "arena":
                first = found[name].first if name in found else i
                found[name] = Lifetime(name, buffers[name].nbytes, first, i)
    return found


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


def largest_live(lifetimes: Sequence[Lifetime]) -> int:
    """The largest sum of bytes live at one step: no arena can be smaller."""
    steps = range(max((t.last for t in lifetimes), default=-1) + 1)
    alive = (sum(t.nbytes for t in lifetimes if t.first <= i <= t.last) for i in steps)
    return max(alive, default=0)
