"""A pointwise convolution and the depthwise one that reads it, in one kernel."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import fx

from graphopt.backends.kernels import expand
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, get_target, last_cache
from graphopt.program.ir import Program
from tests.backends.harness import Builder, aten, check, origins, runnable

TARGETS = ["x86-64-v4", "x86-64-v3", "x86-64-v2", "arm"]


def small(target: str, last_bytes: int = 48_000) -> Target:
    """The target with caches that hold a few rows of a register tile; AVX-512 has larger ones."""
    chosen = runnable(target)
    larger = max(1, chosen.isa.vector_bytes // 32)
    return replace(chosen, last_bytes=last_bytes * larger, cores=1)


@pytest.fixture
def slow_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if bringing anything from memory took longer than computing it again."""
    monkeypatch.setattr(expand, "_MEMORY", 1e6)


def pair(
    b: Builder, x: fx.Node, wide: int, kernel: int, stride: int, padding: int,
    acts: tuple[str, str] = ("hardswish", "relu"), dilation: int = 1,
) -> fx.Node:  # fmt: skip
    """The two convolutions, each with a function behind it."""
    first, second = (getattr(aten, act).default for act in acts)
    y = b.op(first, b.conv(x, wide, (1, 1)))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": wide}
    return b.op(second, b.conv(y, wide, (kernel, kernel), **options))


def inside(b: Builder, shape: tuple[int, ...]) -> fx.Node:
    """An image in blocks, as inside a network."""
    return b.conv(b.input(b.random(*shape)), shape[1], (1, 1))


@pytest.mark.usefixtures("slow_memory")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("shape", "wide", "kernel", "stride", "padding", "dilation"),
    [
        ((1, 16, 28, 28), 96, 3, 2, 1, 1), ((2, 24, 29, 31), 144, 3, 1, 1, 1),
        ((1, 13, 30, 29), 60, 5, 2, 2, 1), ((1, 16, 29, 40), 40, 7, 1, 0, 1),
        ((1, 16, 33, 20), 72, 3, 1, 2, 2), ((1, 8, 60, 9), 100, 3, 3, 1, 1),
    ],
)  # fmt: skip
def test_bands(
    target: str, shape: tuple[int, ...], wide: int, kernel: int, stride: int, padding: int,
    dilation: int,
) -> None:  # fmt: skip
    """Rows of padding, bands that overlap, ragged channels, a last band that is short."""
    b = Builder(wide)
    y = pair(b, inside(b, shape), wide, kernel, stride, padding, dilation=dilation)
    b.returns(b.conv(y, 24, (1, 1)))
    program = check(b, tolerance=4e-6, target=small(target))
    assert origins(program)[1:-1] == ["expand"]
    assert program.steps[1].tasks > shape[0]
    assert program.steps[1].own_flops >= program.steps[1].flops


@settings(max_examples=8, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2), st.integers(2, 20), st.integers(2, 50), st.integers(2, 40),
    st.integers(2, 40), st.sampled_from([2, 3, 5]), st.integers(1, 3), st.integers(0, 2),
    st.integers(2000, 60_000),
)  # fmt: skip
@example(1, 4, 20, 40, 11, 5, 3, 0, 9000)
def test_any_size(
    batch: int, channels: int, wide: int, height: int, width: int, kernel: int, stride: int,
    padding: int, last_bytes: int,
) -> None:  # fmt: skip
    padding = max(padding, -(-(kernel - min(height, width)) // 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "_MEMORY", 1e6)
        patch.setattr(expand, "_LARGE", 0)
        b = Builder(height)
        y = pair(b, inside(b, (batch, channels, height, width)), wide, kernel, stride, padding)
        b.returns(b.conv(y, 24, (1, 1)))
        program = check(b, tolerance=5e-6, target=small("x86-64-v3", last_bytes), threads=2)
        row_bytes = -(-wide // 8) * 8 * width * 4
        assert "expand" in origins(program) or kernel * row_bytes > last_bytes / 2


@pytest.mark.usefixtures("slow_memory")
def test_operands_of_both_and_in_place() -> None:
    """What the pair adds is what it was made of, so that its memory is not free for the result."""
    b = Builder(5)
    x = inside(b, (1, 32, 24, 24))
    scale, shift = b.constant(b.random(1, 32, 1, 1)), b.constant(b.random(1, 32, 24, 24))
    y = b.op(aten.mul.Tensor, b.conv(x, 32, (1, 1), bias=False), scale)
    y = b.op(aten.add.Tensor, b.conv(y, 32, (3, 3), padding=1, groups=32, bias=False), x)
    b.returns(b.conv(b.op(aten.mul.Tensor, y, shift), 24, (1, 1)))
    assert origins(check(b, tolerance=4e-6, target=small("host")))[1] == "expand"


@pytest.mark.parametrize("case", ["returned", "read twice", "strided", "grouped", "3×3", "cached"])
def test_apart(case: str) -> None:
    b = Builder(6)
    x = inside(b, (1, 16, 28, 28))
    kernel = (3, 3) if case == "3×3" else (1, 1)
    y = b.conv(x, 96, kernel, stride=1 + (case == "strided"), groups=1 + (case == "grouped"))
    z = b.conv(y, 96, (3, 3), padding=1, groups=96)
    b.returns(b.conv(z, 24, (1, 1)))
    if case == "read twice":
        b.returns(b.conv(y, 24, (1, 1)))
    if case == "returned":
        b.returns(y)
    last = 96 * 28 * 28 * 8 if case == "cached" else 48_000
    program = lower(b.finish(), small("x86-64-v3", last), "m", winograd=False)
    assert "depthwise" in origins(program)
    assert "expand" not in origins(program)


def test_what_is_not_stored_needs_no_memory() -> None:
    def built(last_bytes: int) -> Program:
        b = Builder(7)
        x = inside(b, (1, 16, 56, 56))
        b.returns(b.conv(pair(b, x, 96, 3, 2, 1), 24, (1, 1)))
        return lower(b.finish(), small("cortex-a72", last_bytes), "m")

    apart, joined = built(1 << 30), built(200_000)
    expanded = 96 * 56 * 56 * 4
    assert (len(apart.steps), len(joined.steps)) == (4, 3)
    assert joined.arena + 8 * joined.scratch < apart.arena < 2 * expanded
    assert sum(step.flops for step in apart.steps) == sum(step.flops for step in joined.steps)


def test_last_level_cache_of_this_machine(tmp_path: Path) -> None:
    caches = {"index0": ("1", "32K"), "index2": ("2", "1024K"), "index3": ("3", "\n"), "index4": ()}
    for name, values in caches.items():
        (tmp_path / name).mkdir()
        for file, value in zip(("level", "size"), values, strict=False):
            (tmp_path / name / file).write_text(value + "\n")
    assert last_cache(tmp_path) == 1024 * 1024, "those without a size do not count"
    assert last_cache(tmp_path / "nowhere") == 0


def test_bands_suit_the_cores() -> None:
    """A band for each core, of which none has more rows than its part of the caches holds."""
    target = replace(get_target("cortex-a72"), cores=4)
    b = Builder(8)
    y = inside(b, (1, 16, 112, 112))
    b.returns(b.conv(pair(b, y, 96, 3, 2, 1), 24, (1, 1)))
    step = lower(b.finish(), target, "m").steps[1]
    assert step.kernel.origin.startswith("expand")
    assert step.tasks >= 8
    assert step.scratch <= target.last_bytes // 8
