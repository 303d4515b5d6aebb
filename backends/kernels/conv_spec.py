"""What every convolution generator is told: the shapes, and how to reach the operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx

from graphopt.ops.opdef import Expr


@dataclass(frozen=True)
class ConvSpec:
    """A convolution over rows and columns; `groups` of `icg` input to `ocg` output channels."""

    batch: int
    groups: int
    icg: int
    ocg: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def flops(self) -> int:
        """Floating-point operations: two per multiply-add, padding included."""
        outputs = self.batch * self.groups * self.ocg * self.out_size[0] * self.out_size[1]
        return 2 * outputs * self.icg * self.kernel[0] * self.kernel[1]

    def met(self, axis: int) -> int:
        """Taps of rows (axis 0) or columns (1) that meet the input, for all outputs together."""
        first, step = -self.padding[axis], self.stride[axis]
        starts = range(first, first + self.out_size[axis] * step, step)
        taps = range(0, self.kernel[axis] * self.dilation[axis], self.dilation[axis])
        return sum(0 <= start + tap < self.in_size[axis] for start in starts for tap in taps)


@dataclass(frozen=True)
class Accessors:
    """How the kernel reaches its operands.

    Attributes:
        x: `(n, channel, row, column)` → the input element.
        store: `(n, channel, row, column, accumulated value)` emits the epilogue and the store of
            one element; the channel may hold a vectorized variable.
        vector: whether neighbouring channels are neighbours in memory.
        padded: whether channels behind the last one of a block may be stored too.
        heavy: whether the epilogue is too long to repeat for every accumulator.
        fence: the intrinsic to put between products and epilogue (`Request.fence`), or empty.
        ahead: whether to ask for the next pixels' inputs, which come from far.
        vector_in: whether neighbouring channels of the input are neighbours in memory.
        run: channels, from each multiple of it on, that are neighbours in memory at least.
        row: floats of a vector, where neighbouring pixels of the output are neighbours in memory,
            and worth storing so; else 0.
        out: `(n, channel, row, column)` → the output element, for asking for its cache line.
    """

    x: Callable[[Expr, Expr, Expr, Expr], Expr]
    store: Callable[[Expr, Expr, Expr, Expr, Expr], None]
    vector: bool
    padded: bool
    heavy: bool
    fence: str = ""
    ahead: bool = False
    vector_in: bool = False
    run: int = 1
    row: int = 0
    out: Callable[[Expr, Expr, Expr, Expr], Expr] | None = None


def kernel_rows(spec: ConvSpec, row: Expr) -> tuple[Expr, Expr]:
    """The kernel rows that meet the input: `low ≤ kh < high`."""
    kernel, dilation, size = spec.kernel[0], spec.dilation[0], spec.in_size[0]
    last = (spec.out_size[0] - 1) * spec.stride[0] - spec.padding[0] + (kernel - 1) * dilation
    low: Expr = 0
    high: Expr = kernel
    if spec.padding[0] > 0:
        low = tirx.min(tirx.max(0, -row + dilation - 1) // dilation, kernel)
    if last >= size:
        high = tirx.max(low, tirx.min(kernel, (size - row + dilation - 1) // dilation))
    return low, high
