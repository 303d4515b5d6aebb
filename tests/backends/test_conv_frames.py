"""3-D convolutions as 2-D ones: over time, as one row, and first layers of videos."""

from __future__ import annotations

from typing import Any

import pytest

from graphopt.backends.kernels import winograd_choice
from tests.backends.harness import Builder, aten, check, origins


@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((2, 13, 5, 6, 7), 3, {"padding": [1, 0, 0]}),
        ((1, 16, 9, 3, 5), 5, {"padding": [2, 0, 0], "stride": [2, 1, 1]}),
        ((1, 16, 9, 4, 4), 3, {"padding": [2, 0, 0], "dilation": [2, 1, 1]}),
        ((1, 8, 1, 4, 5), 3, {"padding": [1, 0, 0]}),
        ((1, 8, 4, 1, 1), 2, {}),
        ((2, 11, 3, 5, 4), 1, {"padding": [1, 0, 0]}),
        ((2, 11, 5, 5, 4), 1, {"stride": [2, 1, 1]}),
    ],
)
def test_over_time(size: tuple[int, ...], kernel: int, options: dict[str, Any]) -> None:
    """From a plain tensor and from blocks, to blocks and to a plain tensor; nothing is padded."""
    b = Builder(1)
    x = b.input(b.random(*size))
    first = b.op(aten.relu.default, b.conv(x, 24, (kernel, 1, 1), **options))
    y = b.conv(b.conv(x, size[1], (1, 1, 1)), 10, (kernel, 1, 1), **options)
    b.returns(b.conv(first, 4, (1, 1, 1)), y)
    program = check(b, threads=2)
    assert "map" not in origins(program)


def test_winograd_over_time() -> None:
    """S3D's layers: any number of frames, each of them a row."""
    b = Builder(2)
    x = b.conv(b.input(b.random(1, 3, 7, 14, 14)), 64, (1, 1, 1))
    y = b.op(aten.relu.default, b.conv(x, 64, (3, 1, 1), padding=[1, 0, 0]))
    b.returns(b.conv(y, 8, (1, 1, 1)))
    assert "winograd" in origins(check(b))


def test_pixels_of_all_frames_are_one_row() -> None:
    """Frames of 7×7 would leave half of a register tile empty, and are too few for Strassen's."""
    b = Builder(3)
    x = b.conv(b.input(b.random(1, 3, 8, 7, 7)), 384, (1, 1, 1))
    y = b.op(aten.relu.default, b.conv(x, 384, (1, 1, 1)))
    b.returns(b.conv(y, 8, (1, 1, 1)))
    assert "strassen" in origins(check(b, tolerance=4e-6))


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        ((1, 7, 7), [1, 2, 2], [0, 3, 3]),
        ((3, 7, 7), [1, 2, 2], [1, 3, 3]),
        ((5, 5, 6), [2, 2, 3], [0, 0, 2]),
    ],
)
def test_first_layers(
    kernel: tuple[int, ...], stride: list[int], padding: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows of the user's frames are channels of Winograd's convolution."""
    monkeypatch.setattr(winograd_choice, "direct_cost", lambda *_: float("inf"))
    b = Builder(4)
    x = b.input(b.random(2, 3, 6, 21, 26))
    y = b.op(aten.relu.default, b.conv(x, 24, kernel, stride=stride, padding=padding))
    b.returns(b.conv(y, 4, (1, 1, 1)))
    assert "winograd" in origins(check(b, tolerance=1e-5, threads=2))
