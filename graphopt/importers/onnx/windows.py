"""The sliding windows of ONNX convolutions and pools: kernel, strides, dilations, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.importers.onnx.values import OnnxNode, Refused


@dataclass(frozen=True)
class Windows:
    """Windows over the spatial axes, `auto_pad` resolved.

    Attributes:
        pads: (before, after) per axis.
        output: the number of windows per axis.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    output: tuple[int, ...]

    @property
    def spans(self) -> tuple[int, ...]:
        """What one window covers of each axis."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def symmetric(self) -> bool:
        """Whether every axis is padded alike on both sides."""
        return all(head == tail for head, tail in self.pads)

    def exact_pads(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Pads with which plain windows (rounding down) give `output`, also in `ceil_mode`."""
        amounts = []
        for i, size in enumerate(sizes):
            reach = (self.output[i] - 1) * self.strides[i] + self.spans[i]
            head, tail = self.pads[i]
            amounts.append((head, max(reach - size - head, tail)))
        return amounts


def read_windows(node: OnnxNode, sizes: Sequence[int], kernel: Sequence[int]) -> Windows:
    """The windows a node's attributes describe over spatial axes of these sizes."""
    dimensions = len(sizes)
    strides = node.get_ints("strides") or [1] * dimensions
    dilations = node.get_ints("dilations") or [1] * dimensions
    flat = node.get_ints("pads") or [0] * (2 * dimensions)
    if not len(kernel) == len(strides) == len(dilations) == dimensions == len(flat) // 2:
        raise Refused(f"its attributes do not fit {dimensions} spatial axes")
    mode = node.get_str("auto_pad", "NOTSET")
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    pads = [(flat[i], flat[i + dimensions]) for i in range(dimensions)]
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = [same_pads(*axis, mode) for axis in zip(sizes, spans, strides, strict=True)]
    elif mode == "VALID":
        pads = [(0, 0)] * dimensions
    elif mode != "NOTSET":
        raise Refused(f"auto_pad is {mode!r}")
    ceil = bool(node.get_int("ceil_mode", 0))
    output = [
        _count(size, span, stride, head, tail, ceil)
        for size, span, stride, (head, tail) in zip(sizes, spans, strides, pads, strict=True)
    ]
    if min(output) < 1:
        raise Refused(f"windows of {list(kernel)} do not fit into {list(sizes)}")
    return Windows(tuple(kernel), tuple(strides), tuple(dilations), tuple(pads), tuple(output))


def same_pads(size: int, span: int, stride: int, mode: str) -> tuple[int, int]:
    """Padding for which there are ceil(size / stride) windows; the odd one where `mode` says."""
    total = max((-(-size // stride) - 1) * stride + span - size, 0)
    small, large = total // 2, total - total // 2
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _count(size: int, span: int, stride: int, head: int, tail: int, ceil: bool) -> int:
    room = size + head + tail - span
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    # A window that would start in the padding after the end does not count.
    return count - 1 if (count - 1) * stride >= size + head else count
