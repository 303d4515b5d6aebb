"""Tiles, tasks and packed weights of recurrent layers: see `recurrent.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends.isa.base import Isa
from graphopt.backends.kernels.product import Panels, choose_rows
from graphopt.backends.kernels.tiling import Split, places_of, split
from graphopt.backends.target import Target

_BAND = 4096
"""Floats of scratch that a task may take, where its weights can be read again for another one."""
_TASKS = 4
"""Tasks, at least, where there are enough rows."""
_ONE_ROW_VECTORS = 8
"""Sums of a single row's tile: as many as hide the latency of multiply-adds."""


@dataclass(frozen=True)
class RecurrentPlan:
    """The choices for one layer.

    Attributes:
        steps, batch, directions, hidden: the sizes T, N, D and H.
        phases: the gates that are multiplied together; the next phase needs the ones before.
        keeps_cell: whether there is a second state.
        block: floats of a vector in scratch.
        rows: rows of a register tile.
        panels: the packed weights of each phase.
        bands: tiles of rows, cut into tasks.
        by_lane: whether multiply-adds take one lane of a vector.
        fence: see `Isa.fence`.
    """

    steps: int
    batch: int
    directions: int
    hidden: int
    phases: tuple[int, ...]
    keeps_cell: bool
    block: int
    rows: int
    panels: tuple[Panels, ...]
    bands: Split
    by_lane: bool
    fence: str

    @property
    def width(self) -> int:
        """Floats of a gate or state of a row in scratch."""
        return -(-self.hidden // self.block) * self.block

    @property
    def gates(self) -> int:
        """Gates in all."""
        return sum(self.phases)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where each part of scratch begins, in floats; `end` is where all ends."""
        state = self.bands.size * self.rows * self.width
        return places_of({
            "sums": self.gates * state, "h": state, "c": state * self.keeps_cell,
            "reset": state * (len(self.phases) - 1), "tail": self.gates * self.block,
        })  # fmt: skip


def plan(
    steps: int, batch: int, directions: int, hidden: int, phases: tuple[int, ...],
    keeps_cell: bool, target: Target,
) -> RecurrentPlan:  # fmt: skip
    """Choose tiles and tasks."""
    isa = target.isa.widened()
    blocks = -(-hidden // isa.block)
    columns = [blocks * gates for gates in phases]
    rows, vectors = choose_rows(batch, [(each, hidden) for each in columns], isa)
    if rows == 1:
        vectors = [split(each, _one_row(isa)).size for each in columns]
    panels = tuple(
        Panels(hidden, each * isa.block, isa.block, count)
        for each, count in zip(columns, vectors, strict=True)
    )
    tiles = -(-batch // rows)
    scratch = (sum(phases) + len(phases) + keeps_cell) * blocks * isa.block * rows
    if sum(panel.size for panel in panels) * 4 <= target.l2_bytes // 2:
        largest = max(1, min(_BAND // scratch, -(-tiles * directions // _TASKS)))
    else:
        # Weights from memory are for as many rows as there are.
        largest = -(-tiles // (1 if directions == 2 else 2))
    return RecurrentPlan(
        steps, batch, directions, hidden, phases, keeps_cell, isa.block, rows, panels,
        split(tiles, largest), isa.lane_operand, isa.fence,
    )  # fmt: skip


def _one_row(isa: Isa) -> int:
    registers = max(1, isa.block // isa.lanes())
    return max(1, min(_ONE_ROW_VECTORS, isa.registers // 2 // registers))


def padded(chosen: RecurrentPlan, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The last axis, of H, completed by zeros to whole vectors."""
    wide = np.zeros((*values.shape[:-1], chosen.width), np.float32)
    wide[..., : chosen.hidden] = values
    return wide


def packed(chosen: RecurrentPlan, weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[D, G·H, H] as the panels of all phases, one direction behind the other."""
    parts = []
    for gates in weight.reshape(chosen.directions, chosen.gates, chosen.hidden, chosen.hidden):
        first = 0
        for count, panels in zip(chosen.phases, chosen.panels, strict=True):
            matrix = padded(chosen, gates[first : first + count].transpose(2, 0, 1))
            wide = np.zeros((panels.depth, panels.size // panels.depth), np.float32)
            wide[:, : panels.columns] = matrix.reshape(panels.depth, panels.columns)
            cut = wide.reshape(panels.depth, -1, panels.width).transpose(1, 0, 2)
            parts.append(cut.reshape(-1))
            first += count
    return np.concatenate(parts)
