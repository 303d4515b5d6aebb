"""Drop the taps of a convolution's kernel that meet nothing but padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.rewrite import Editor, Rule, apply_rules


@dataclass(frozen=True)
class _Crop:
    """A convolution, and how many taps to drop at both ends of each axis."""

    conv: fx.Node
    taps: tuple[int, ...]


@dataclass(frozen=True)
class CropKernel(Pass):
    """Drop the taps of a convolution's kernel that meet nothing but padding.

    ::

        convolution(3×3, dilation 24, padding 24) of 14×14   →   convolution(1×1)

    They are found in dilated convolutions of small images (the pyramid of a DeepLab), and in large
    kernels over few pixels. As many go at one end as at the other, for the padding stays the same
    on both sides. Sums may be taken in another order.
    """

    name = "crop_kernel"
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("canonicalize", "fold_pad")

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule until it fits nowhere."""
        notes = NoteBook()
        rule = Rule("crop kernel", (aten.convolution.default,), _croppable, _crop)
        apply_rules(graph, (rule,), notes)
        return notes.result()


def _croppable(_gm: fx.GraphModule, conv: fx.Node) -> _Crop | None:
    a = bind(conv)
    if a["transposed"]:
        return None
    axes = zip(
        g.shape(a["input"])[2:], g.shape(a["weight"])[2:], g.shape(conv)[2:],
        a["stride"], a["padding"], a["dilation"], strict=True,
    )  # fmt: skip
    taps = tuple(_idle_taps(*axis) for axis in axes)
    return _Crop(conv, taps) if any(taps) else None


def _idle_taps(
    size: int, kernel: int, outputs: int, stride: int, padding: int, dilation: int
) -> int:
    """Taps at each end of an axis that no output finds an input under."""

    def meets(tap: int) -> bool:
        first = tap * dilation - padding
        return any(0 <= first + i * stride < size for i in range(outputs))

    used = [tap for tap in range(kernel) if meets(tap)]
    if not used:
        return 0
    # The padding that is left may not be negative.
    return min(used[0], kernel - 1 - used[-1], padding // dilation)


def _crop(ed: Editor, found: _Crop) -> fx.Node:
    a = bind(found.conv)
    weight, padding = a["weight"], list(a["padding"])
    for axis, taps in enumerate(found.taps):
        if taps:
            end = g.shape(weight)[axis + 2] - taps
            weight = ed.call(aten.slice.Tensor, weight, axis + 2, taps, end)
            padding[axis] -= taps * a["dilation"][axis]
    arguments: dict[str, Any] = {**a, "weight": weight, "padding": padding}
    return ed.call(aten.convolution.default, *arguments.values())
