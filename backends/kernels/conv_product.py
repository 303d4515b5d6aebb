"""The ways to multiply by packed weights: `conv_deep`, `conv_direct`, each with its best tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends.kernels import conv_deep, conv_deep_plan, conv_direct, conv_direct_plan
from graphopt.backends.kernels.base import Request
from graphopt.backends.kernels.conv_deep_plan import DeepPlan
from graphopt.backends.kernels.conv_direct_plan import ConvPlan
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.target import Target
from graphopt.ops.opdef import Expr


@dataclass(frozen=True)
class Product:
    """A planned product.

    Attributes:
        origin: generator and configuration, for the report.
        cycles: estimated cycles of one core.
        tasks: number of independent tasks.
        scratch: bytes of scratch per thread.
        pack: packs `(groups·ocg, icg, KH, KW)` weights.
        emit: `emit(task, weights, scratch, access)` emits one task.
    """

    origin: str
    cycles: float
    tasks: int
    scratch: int
    pack: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    emit: Callable[[Expr, Any, Any, Accessors], None]


def products(spec: ConvSpec, target: Target, *, plain: bool = False) -> list[Product]:
    """Plan the convolution each way; the one that the cost model takes comes first.

    Args:
        spec: the convolution.
        target: what to build for.
        plain: whether neighbouring columns of the input are neighbours in memory, and not channels.
    """
    isa = target.isa
    direct = direct_products(spec, target, plain=plain)
    plans = conv_deep_plan.plans(spec, isa, target.l2_bytes, plain=plain)
    if not plans:
        return direct
    deep = [_deep(plan, target) for plan in plans]
    # What need not gather, or gathers one tap, is better off for its weights alone.
    turns = plans[0].row > 0 or (plans[0].gathers and plans[0].taps > 1)
    if turns and deep[0].cycles > direct[0].cycles:
        return [*direct, *deep]
    return [*deep, *direct]


def direct_products(spec: ConvSpec, target: Target, *, plain: bool = False) -> list[Product]:
    """The ways of `conv_direct`, the best first."""
    return [
        _direct(plan, target, plain)
        for plan in conv_direct_plan.plans(spec, target.isa, target.l2_bytes, plain=plain)
    ]


def deep_products(spec: ConvSpec, target: Target) -> list[Product]:
    """The ways of `conv_deep`, the best first."""
    return [_deep(plan, target) for plan in conv_deep_plan.plans(spec, target.isa, target.l2_bytes)]


def _direct(plan: ConvPlan, target: Target, plain: bool) -> Product:
    return Product(
        plan.describe(), conv_direct_plan.cost(plan, target.isa, plain=plain), plan.tasks, 0,
        lambda weight: conv_direct.pack_weights(weight, plan),
        lambda task, weights, scratch, access: conv_direct.emit(plan, task, weights, access),
    )  # fmt: skip


def _deep(plan: DeepPlan, target: Target) -> Product:
    return Product(
        plan.describe(), conv_deep_plan.cost(plan, target.isa), plan.tasks, plan.scratch,
        lambda weight: conv_deep.pack_weights(weight, plan),
        lambda task, weights, scratch, access: conv_deep.emit(
            plan, task, weights, scratch, access
        ),
    )  # fmt: skip


def key_of(kind: str, spec: ConvSpec, request: Request, *details: str) -> str:
    """What decides the speed of each way to compute a convolution; see `Alternatives.key`."""

    def text(value: int | tuple[int, ...]) -> str:
        return str(value) if isinstance(value, int) else "x".join(map(str, value))

    numbers = (f"{each.name}={text(getattr(spec, each.name))}" for each in fields(spec))
    weight = "heavy" if request.heavy_epilogue else "light"
    return " ".join((kind, *numbers, *details, weight))
