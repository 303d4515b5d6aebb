"""The ways to convolve with packed weights: `conv_deep`, `conv_direct`, each with its best tiles,
`winograd`, and `strassen`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels import (
    conv_deep,
    conv_deep_plan,
    conv_direct,
    conv_direct_plan,
    strassen,
    strassen_plan,
    winograd,
    winograd_choice,
)
from graphopt.backends.kernels.base import Request
from graphopt.backends.kernels.conv_deep_plan import DeepPlan
from graphopt.backends.kernels.conv_direct_plan import ConvPlan
from graphopt.backends.kernels.conv_spec import Accessors, ConvSpec
from graphopt.backends.kernels.strassen_plan import StrassenPlan
from graphopt.backends.kernels.tiling import MOST_PIXELS
from graphopt.backends.kernels.winograd_plan import WinogradPlan
from graphopt.backends.target import Target
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

_WAITS = 0.1
"""Cycles that direct convolution waits for a byte of weights from memory, which it does not ask for
ahead: 384→256, 3×3, stride 2 on 10×9 took 637 µs instead of 490."""


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
        own_flops: operations that the algorithm does, where they are others than the layer's.
    """

    origin: str
    cycles: float
    tasks: int
    scratch: int
    pack: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]]
    emit: Callable[[Expr, Any, Any, Accessors], None]
    own_flops: int | None = None


def products(
    spec: ConvSpec, target: Target, *, plain: bool = False, most: int = MOST_PIXELS
) -> list[Product]:
    """Plan the convolution each way; the one that the cost model takes comes first.

    Args:
        spec: the convolution.
        target: what to build for.
        plain: whether neighbouring columns of the input are neighbours in memory, and not channels.
        most: pixels of a register tile, at most.
    """
    isa = target.isa
    direct = direct_products(spec, target, plain=plain, most=most)
    plans = conv_deep_plan.plans(spec, isa, target.l2_bytes, plain=plain, most=most)
    if not plans:
        return direct
    deep = [_deep(plan, target) for plan in plans]
    # What need not gather, or gathers one tap, is better off for its weights alone.
    turns = plans[0].row > 0 or (plans[0].gathers and plans[0].taps > 1)
    if turns and deep[0].cycles > direct[0].cycles:
        return [*direct, *deep]
    return [*deep, *direct]


def direct_products(
    spec: ConvSpec, target: Target, *, plain: bool = False, most: int = MOST_PIXELS
) -> list[Product]:
    """The ways of `conv_direct`, the best first."""
    isa, l2_bytes = target.isa, target.l2_bytes
    plans = conv_direct_plan.plans(spec, isa, l2_bytes, plain=plain, most=most)
    return [_direct(plan, target, plain) for plan in plans]


def deep_products(spec: ConvSpec, target: Target) -> list[Product]:
    """The ways of `conv_deep`, the best first."""
    return [_deep(plan, target) for plan in conv_deep_plan.plans(spec, target.isa, target.l2_bytes)]


def winograd_products(
    spec: ConvSpec, target: Target, instead: Sequence[ConvSpec], *, plain: bool = False
) -> tuple[list[Product], bool]:
    """The ways of `winograd`, which stores blocks only, the best first; none for other kernels.

    Also whether the best one pays beside direct convolution of all of `instead`.
    """
    isa, l2_bytes = target.isa, target.l2_bytes
    if not winograd_choice.supports(spec, isa.block):
        return [], False
    plans = winograd_choice.plans(spec, isa, l2_bytes, target.cores, plain=plain)
    pays = bool(plans) and winograd_choice.pays(plans[0], spec.groups, instead, isa, l2_bytes)
    return [_winograd(plan, spec.groups, target) for plan in plans], pays


def with_strassen(
    direct: list[Product], spec: ConvSpec, target: Target, *, plain: bool
) -> list[Product]:
    """The ways of a pointwise convolution or matrix product, `direct`, and those of `strassen`.

    The latter come first if the best of them pays; there are none for channels that are no whole
    blocks.

    Args:
        direct: the other ways, the best first.
        spec: the product; its rows of one image are paired.
        target: what to build for.
        plain: whether all channels of a pixel are neighbours in memory, not those of a block only.
    """
    isa = target.isa
    if not strassen_plan.supports(spec, isa.block):
        return direct
    plans = strassen_plan.plans(spec, isa, target.l2_bytes, target.cores, plain=plain)
    found = [_strassen(plan, target) for plan in plans]
    pays = strassen_plan.pays(plans[0], isa, direct[0].cycles)
    return [*found, *direct] if pays else [*direct, *found]


def _direct(plan: ConvPlan, target: Target, plain: bool) -> Product:
    spec = plan.spec
    weights = 4 * spec.groups * spec.icg * spec.ocg * spec.kernel[0] * spec.kernel[1]
    waits = _WAITS * weights if weights > target.l2_bytes else 0.0
    cycles = waits + conv_direct_plan.cost(plan, target.isa, plain=plain)
    return Product(
        plan.describe(), cycles, plan.tasks, 0,
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


def _strassen(plan: StrassenPlan, target: Target) -> Product:
    return Product(
        plan.describe(), strassen_plan.cost(plan, target.isa), plan.tasks, plan.places["end"] * 4,
        lambda weight: strassen.pack_weights(weight, plan),
        lambda task, weights, scratch, access: strassen.emit(
            plan, task, weights, scratch, access
        ),
        own_flops=plan.operations,
    )  # fmt: skip


def _winograd(plan: WinogradPlan, groups: int, target: Target) -> Product:
    """All groups of a convolution; the plan is that of one."""
    cycles = groups * winograd_choice.cost(plan, target.isa, target.l2_bytes)

    def pack(weight: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        parts = np.split(weight, groups)
        return np.concatenate([winograd.pack_weights(each, plan) for each in parts])

    def emit(task: Expr, weights: Any, scratch: Any, access: Accessors) -> None:
        if groups > 1:
            number, task = share(task // plan.tasks), tirx.max(share(task % plan.tasks), 0)
            size = int(weights.shape[0]) // groups
            weights = T.decl_buffer(
                (size,), "float32", data=weights.data, elem_offset=number * size
            )
            access = _of_group(access, number * plan.spec.icg, number * plan.spec.ocg)
        winograd.emit(plan, task, weights, scratch, access)

    return Product(plan.describe(), cycles, groups * plan.tasks, plan.scratch, pack, emit,
                   own_flops=groups * plan.operations)  # fmt: skip


def _of_group(access: Accessors, first_in: Expr, first_out: Expr) -> Accessors:
    """The operands of the group whose channels begin there."""
    out = access.out
    return replace(
        access,
        x=lambda n, c, h, w: access.x(n, first_in + c, h, w),
        store=lambda n, c, h, w, value: access.store(n, first_out + c, h, w, value),
        out=None if out is None else lambda n, c, h, w: out(n, first_out + c, h, w),
    )


def key_of(kind: str, spec: ConvSpec, request: Request, *details: str) -> str:
    """What decides the speed of each way to compute a convolution; see `Alternatives.key`."""

    def text(value: int | tuple[int, ...]) -> str:
        return str(value) if isinstance(value, int) else "x".join(map(str, value))

    numbers = (f"{each.name}={text(getattr(spec, each.name))}" for each in fields(spec))
    weight = "heavy" if request.heavy_epilogue else "light"
    return " ".join((kind, *numbers, *details, weight))
