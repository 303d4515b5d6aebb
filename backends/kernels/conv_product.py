"""The choice between the two ways to multiply by packed weights: `conv_deep`, `conv_direct`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.backends.kernels import conv_deep, conv_direct
from graphopt.backends.kernels.conv_direct import Accessors, ConvSpec
from graphopt.backends.target import Target
from graphopt.ops.opdef import Expr


@dataclass(frozen=True)
class Product:
    """A planned product.

    Attributes:
        origin: generator and configuration, for the report.
        tasks: number of independent tasks.
        scratch: bytes of scratch per thread.
        weights: the packed weights.
        emit: `emit(task, weights, scratch, access)` emits one task.
    """

    origin: str
    tasks: int
    scratch: int
    weights: npt.NDArray[np.float32]
    emit: Callable[[Expr, Any, Any, Accessors], None]


def conv_product(
    spec: ConvSpec, weight: npt.NDArray[Any], target: Target, *, may_gather: bool = True
) -> Product:
    """Plan the convolution with `(groups·ocg, icg, KH, KW)` weights.

    Args:
        spec: the convolution.
        weight: its weights.
        target: what to build for.
        may_gather: whether neighbouring channels of the input are neighbours in memory, so that it
            can be gathered in vectors.
    """
    isa = target.isa
    conv = conv_direct.plan(spec, isa, target.l2_bytes)
    deep = conv_deep.plan(spec, isa, target.l2_bytes)
    if deep is not None and deep.gathers:
        slower = conv_deep.cost(deep, isa) > conv_direct.cost(conv, isa)
        deep = None if slower or not may_gather else deep
    if deep is not None:
        return Product(
            deep.describe(), deep.tasks, deep.scratch, conv_deep.pack_weights(weight, deep),
            lambda task, weights, scratch, access: conv_deep.emit(
                deep, task, weights, scratch, access
            ),
        )  # fmt: skip
    return Product(
        conv.describe(), conv.tasks, 0, conv_direct.pack_weights(weight, conv),
        lambda task, weights, scratch, access: conv_direct.emit(conv, task, weights, access),
    )  # fmt: skip
