"""LLVM keeps the accumulators of products in registers: their innermost loops touch no stack.

Whether it does depends on what stands around a loop, and nothing else would tell: results stay
right, and a kernel takes up to twice as long.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import fx

from graphopt import graph as G
from graphopt.backends.target import get_target
from graphopt.ops import recurrent
from tests.backends.harness import Builder, aten
from tests.backends.loops import Layer, assembly_of, loops_of, product_loops

PLAIN, PLAIN_IN, PLAIN_OUT = (False, False), (False, True), (True, False)


def conv(channels: int, *kernel: int, **options: Any) -> Layer:
    return lambda b, x: b.conv(x, channels, kernel, **options)


def linear(columns: int) -> Layer:
    def layer(b: Builder, x: fx.Node) -> fx.Node:
        weight = b.constant(b.random(columns, G.shape(x)[-1]))
        return b.op(aten.linear.default, x, weight, b.constant(b.random(columns)))

    return layer


def transposed(b: Builder, x: fx.Node) -> fx.Node:
    weight = b.constant(b.random(G.shape(x)[1], 32, 2, 2))
    return b.op(aten.convolution.default, x, weight, None, [2, 2], [0, 0], [1, 1], True, [0, 0], 1)


def expanded(b: Builder, x: fx.Node) -> fx.Node:
    wide = b.op(aten.relu.default, b.conv(x, 96, (1, 1)))
    return b.conv(wide, 96, (3, 3), padding=1, groups=96)


def lstm(b: Builder, x: fx.Node) -> fx.Node:
    """Of gates for both directions."""
    hidden = G.shape(x)[-1] // 8
    weight = b.constant(b.random(2, 4 * hidden, hidden) / hidden**0.5)
    functions = ["sigmoid", "tanh", "tanh"]
    return b.op(recurrent.lstm, x, weight, None, None, False, functions)


def gru(reset_after: bool) -> Layer:
    def layer(b: Builder, x: fx.Node) -> fx.Node:
        hidden = G.shape(x)[-1] // 6
        weight = b.constant(b.random(2, 3 * hidden, hidden) / hidden**0.5)
        functions = ["sigmoid", "tanh"]
        return b.op(recurrent.gru, x, weight, None, None, False, reset_after, functions)

    return layer


def chain(b: Builder, x: fx.Node) -> fx.Node:
    """Many short operations, which make a long epilogue."""
    for number in range(4):
        x = b.op(aten.relu.default, b.op(aten.mul.Tensor, x, number + 0.5))
    return x


@dataclass(frozen=True)
class Case:
    """A kernel to look at.

    Attributes:
        origin: what must generate it.
        layer: its anchor.
        shape: its input's.
        epilogues: what follows the anchor, one after the other.
        blocked: see `assembly_of`.
        allowed: how many stack accesses a loop of so many multiply-adds may have; else none.
        reason: why there are any.
    """

    origin: str
    layer: Layer
    shape: tuple[int, ...]
    epilogues: str
    blocked: tuple[bool, bool] = (True, True)
    allowed: Mapping[int, int] = field(default_factory=dict)
    reason: str = ""


EARLY = "a vector or two of the next channel's weights, loaded early; no accumulator"
EDGES = "at the ends of a row, where a tile has products for some of its pixels only"

CASES = {
    "3×3": Case(
        "conv_direct 16×6", conv(32, 3, 3, padding=1), (1, 16, 18, 18), "relu silu",
        allowed={80: 4}, reason=EDGES,
    ),
    "3×3 unpadded": Case("conv_direct 16×5", conv(64, 3, 3), (1, 32, 22, 22), "relu silu chain"),
    "3×3 unpadded stride 2": Case(
        "conv_direct 16×5", conv(64, 3, 3, stride=2), (1, 32, 41, 41), "relu silu gelu"
    ),
    "5×5": Case("conv_direct 16×5", conv(16, 5, 5, padding=2), (1, 16, 20, 20), "relu"),
    "5×5 unpadded": Case("conv_direct 16×6", conv(32, 5, 5), (1, 16, 33, 33), "relu gelu"),
    "7×7 unpadded": Case("conv_direct 16×5", conv(64, 7, 7), (1, 64, 16, 16), "relu"),
    "1×1": Case(
        "conv_direct 16×6", conv(64, 1, 1), (1, 64, 20, 20), "relu silu gelu chain",
        allowed={96: 2}, reason=EARLY,
    ),
    "1×1 to 24": Case("conv_direct 24×3", conv(24, 1, 1), (1, 64, 20, 20), "relu"),
    "1×1 to 8": Case("conv_direct 8×13", conv(8, 1, 1), (1, 64, 20, 20), "relu silu"),
    "3×3 to 8": Case("conv_direct 8×9", conv(8, 3, 3, padding=1), (1, 16, 18, 18), "relu"),
    "image": Case(
        "conv_direct 16×6", conv(32, 3, 3, padding=1, stride=2), (1, 3, 36, 36), "relu silu",
        PLAIN_IN,
    ),
    "plain output": Case(
        "conv_direct 16×6", conv(80, 1, 1), (1, 64, 20, 20), "silu", PLAIN_OUT,
        allowed={96: 2}, reason=EARLY,
    ),
    "1-D": Case(
        "conv_direct 16×6", conv(64, 3, padding=1), (1, 64, 96), "relu silu",
        allowed={80: 17}, reason=EDGES,
    ),
    "grouped": Case(
        "conv_direct 16×6", conv(64, 3, 3, padding=1, groups=4), (1, 64, 18, 18), "relu",
        allowed={80: 4}, reason=EDGES,
    ),
    "grouped by 8": Case(
        "conv_direct 8×9", conv(32, 3, 3, padding=1, groups=4), (1, 32, 18, 18), "relu"
    ),
    "transposed": Case(
        "transposed conv_direct 16×6", transposed, (1, 64, 12, 12), "relu", allowed={96: 2},
        reason=EARLY,
    ),
    "deep 1×1": Case("conv_deep 16×6", conv(256, 1, 1), (1, 512, 14, 14), "relu silu"),
    "deep 1×1 in one part": Case(
        "conv_deep 16×6", conv(384, 1, 1), (1, 192, 14, 14), "relu silu gelu chain",
        allowed={80: 4, 96: 4}, reason=EARLY,
    ),
    "deep 1×1 in one part to a plain output": Case(
        "conv_deep 16×6", conv(384, 1, 1), (1, 192, 14, 14), "relu silu", PLAIN_OUT,
        allowed={80: 4, 96: 4}, reason=EARLY,
    ),
    "deep 3×3": Case(
        "conv_deep 16×6", conv(256, 3, 3, padding=1, stride=2), (1, 512, 14, 14), "relu"
    ),
    "deep of a plain input": Case(
        "conv_deep 16×6", conv(256, 1, 1), (1, 464, 7, 7), "gelu", PLAIN_IN
    ),
    "linear": Case("gemm_deep 16×6", linear(384), (128, 384), "relu gelu chain", PLAIN),
    "linear, odd rows": Case(
        "gemm_deep 16×6", linear(192), (100, 192), "gelu", PLAIN, allowed={80: 4}, reason=EARLY
    ),
    "linear, ragged": Case(
        "gemm_deep 16×6", linear(100), (128, 192), "gelu", PLAIN, allowed={80: 4}, reason=EARLY
    ),
    "Winograd F(4×4)": Case(
        "winograd F(4×4,3×3) 24×3", conv(24, 3, 3, padding=1), (1, 24, 76, 76), "silu"
    ),
    "Winograd F(3×3)": Case(
        "winograd F(3×3,3×3) 16×6", conv(64, 3, 3, padding=1), (1, 64, 21, 21), "silu"
    ),
    "Winograd F(2×2)": Case(
        "winograd F(2×2,3×3) 16×6", conv(128, 3, 3, padding=1), (1, 128, 7, 7), "relu",
        allowed={80: 4, 96: 2}, reason=EARLY,
    ),
    "Winograd to 40": Case(
        "winograd F(4×4,3×3) 8×13", conv(40, 3, 3, padding=1), (1, 40, 28, 28), "relu"
    ),
    "expand": Case(
        "expand 16×6", expanded, (1, 24, 112, 112), "relu silu", allowed={96: 2}, reason=EARLY
    ),
    "Strassen": Case("strassen 16×6", linear(768), (1, 128, 768), "relu gelu", PLAIN),
    "Strassen 1×1": Case("strassen 16×6", conv(512, 1, 1), (1, 512, 14, 14), "relu silu"),
    "lstm, one row": Case("lstm 64×1", lstm, (5, 1, 8 * 128), "relu", PLAIN),
    "lstm, a batch": Case("lstm 16×4", lstm, (5, 32, 8 * 48), "relu silu", PLAIN),
    "lstm, three rows": Case("lstm 24×3", lstm, (5, 3, 8 * 40), "relu", PLAIN),
    "gru, one row": Case("gru 64×1", gru(True), (5, 1, 6 * 128), "relu", PLAIN),
    "gru, reset before": Case("gru 16×4", gru(False), (5, 32, 6 * 48), "relu", PLAIN),
}  # fmt: skip


KERNELS = [
    pytest.param(case, epilogue, id=f"{name}, {epilogue}")
    for name, case in CASES.items()
    for epilogue in case.epilogues.split()
]


@pytest.mark.parametrize(("case", "epilogue"), KERNELS)
def test_products_spill_nothing(case: Case, epilogue: str) -> None:
    def layer(b: Builder, x: fx.Node) -> fx.Node:
        y = case.layer(b, x)
        return chain(b, y) if epilogue == "chain" else b.op(getattr(aten, epilogue).default, y)

    def spilled(target: str, allowed: Mapping[int, int]) -> tuple[str, list[str]]:
        origin, text = assembly_of(layer, case.shape, get_target(target), blocked=case.blocked,
                                   winograd=case.origin.startswith("winograd"),
                                   strassen=case.origin.startswith("strassen"),
                                   expand=case.origin.startswith("expand"))  # fmt: skip
        loops = product_loops(text)
        assert loops
        return origin, [
            f"{loop.label}: {loop.spills} stack accesses beside {loop.multiply_adds} multiply-adds"
            for loop in loops
            if loop.spills > allowed.get(loop.multiply_adds, 0)
        ]

    assert spilled("x86-64-v3", case.allowed) == (case.origin, [])
    # Twice the registers, and other tiles.
    origin, found = spilled("x86-64-v4", {})
    assert origin.split(" ")[0] == case.origin.split(" ")[0]
    assert not found, origin


X86 = """
kernel:
.LBB0_1:
	vmovups	8(%rsp), %ymm1
.LBB0_2:
	vbroadcastss	(%rdi,%rax,4), %ymm0
	vfmadd231ps	32(%rsp), %ymm0, %ymm2
	vmovups	%ymm2, -64(%rsp)
	vmovups	(%rsp,%rax), %ymm3
	movq	16(%rsp), %rax
	#APP
	vfmadd231ps	%ymm3, %ymm0, %ymm2
	#NO_APP
	jne	.LBB0_2
	vmaxps	%ymm0, %ymm1, %ymm1
	jb	.LBB0_1
"""
ARM = """
kernel:
.LBB0_1:
	ldp	q1, q2, [sp, #32]
	fmla	v0.4s, v1.4s, v2.s[0]
	str	q0, [x0, #16]
	ldr	x3, [sp, #8]
	subs	x1, x1, #1
	b.ne	.LBB0_1
"""


def test_counts_what_is_spilled() -> None:
    outer, inner = loops_of(X86)
    assert (outer.innermost, inner.innermost) == (False, True)
    # An indexed access is one to an array; the others are an operand and a store.
    assert (inner.label, inner.multiply_adds, inner.spills) == (".LBB0_2", 2, 2)
    assert (outer.arithmetic, outer.spills) == (1, 1)
    (loop,) = product_loops(ARM)
    assert (loop.multiply_adds, loop.spills) == (1, 1)
