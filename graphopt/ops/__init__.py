"""Every operator graphopt compiles, by the ATen overload that calls it."""

from __future__ import annotations

from typing import Any

from graphopt.ops.adaptive import ADAPTIVE
from graphopt.ops.anchor import ANCHOR
from graphopt.ops.elementwise import ELEMENTWISE
from graphopt.ops.opdef import Call, Kind, OpDef
from graphopt.ops.order import ORDER
from graphopt.ops.recurrent import RECURRENT
from graphopt.ops.reduce import REDUCE
from graphopt.ops.shape import SHAPE

ALL_OPS: tuple[OpDef, ...] = (
    *ELEMENTWISE, *SHAPE, *REDUCE, *ADAPTIVE, *ANCHOR, *ORDER, *RECURRENT
)  # fmt: skip

OPS: dict[Any, OpDef] = {target: op for op in ALL_OPS for target in op.targets}

__all__ = ["ALL_OPS", "OPS", "Call", "Kind", "OpDef"]
