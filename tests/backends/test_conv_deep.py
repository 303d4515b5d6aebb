"""Products with many weights: every cut of pixels, channels and depth, and when they are chosen."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt import graph as G
from graphopt.backends.kernels import conv_deep_plan, conv_direct_plan, winograd_choice
from graphopt.backends.kernels.conv_product import products
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.target import Target, get_target
from tests.backends.harness import Builder, aten, check, origins


def _without_cache(name: str) -> Target:
    """A target on which hardly any weights fit the second-level cache."""
    return dataclasses.replace(get_target(name), l2_bytes=64)


def _with_panels(target: Target, panel_bytes: int) -> Target:
    """The target with panels of weights of at most so many bytes."""
    return dataclasses.replace(target, isa=dataclasses.replace(target.isa, panel_bytes=panel_bytes))


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2), st.sampled_from([2, 3, 8]), st.integers(17, 60),
    st.tuples(st.integers(3, 9), st.integers(3, 9)), st.sampled_from([(1, 1), (3, 3), (2, 3)]),
    st.sampled_from([(1, 1), (2, 2), (1, 2)]), st.integers(0, 2), st.integers(1, 2),
    st.sampled_from([64, 1024, 12288]), st.sampled_from([7, 30, 256]),
)  # fmt: skip
def test_any_convolution(
    batch: int, blocks: int, out: int, size: tuple[int, int], kernel: tuple[int, int],
    stride: tuple[int, int], padding: int, dilation: int, panel: int, most_pixels: int,
) -> None:  # fmt: skip
    """Odd sizes, ragged channels, several parts and blocks of pixels, an epilogue with operands."""
    reach = [(k - 1) * dilation + 1 - 2 * padding for k in kernel]
    height, width = (max(n, r) for n, r in zip(size, reach, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_deep_plan, "_MOST_PIXELS", most_pixels)
        patch.setattr(conv_deep_plan, "_few", lambda *_: 0)
        patch.setattr(conv_direct_plan, "cost", lambda *_, **__: float("inf"))
        patch.setattr(winograd_choice, "supports", lambda *_: False)
        b = Builder(height)
        channels = blocks * get_target("host").isa.block
        x = b.conv(b.input(b.random(batch, 3, height, width)), channels, (1, 1))
        y = b.conv(x, out, kernel, stride=list(stride), padding=padding, dilation=dilation)
        z = b.op(aten.add.Tensor, b.op(aten.silu.default, y), y)
        b.returns(b.conv(z, 4, (1, 1)))
        program = check(b, target=_with_panels(get_target("host"), panel), tolerance=1e-5)
    rows, columns = program.buffers[program.steps[1].writes[0]].shape[2:]
    assert (origins(program)[1] == "conv_deep") == (rows * columns >= 4)


@pytest.mark.parametrize("target", ["host", "arm"])
@pytest.mark.parametrize("kernel", [(8, 8), (4, 4), (2, 3), (1, 16), (16, 1)])
def test_patches_of_a_plain_image(
    target: str, kernel: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows side by side, with columns left over; ragged channels, batches, several parts."""
    monkeypatch.setattr(conv_deep_plan, "_MOST_PIXELS", 7)
    monkeypatch.setattr(conv_direct_plan, "cost", lambda *_, **__: float("inf"))
    b = Builder(0)
    x = b.input(b.random(2, 8, 3 * kernel[0] + 1, 4 * kernel[1] + kernel[1] // 2))
    y = b.op(aten.relu.default, b.conv(x, 21, kernel, stride=list(kernel)))
    b.returns(b.conv(y, 4, (1, 1)), y)
    program = check(b, target=_with_panels(_without_cache(target), 2048), tolerance=5e-6)
    assert origins(program)[0] == "conv_deep"


@pytest.mark.parametrize("target", ["host", "x86-64-v2", "arm"])
@pytest.mark.parametrize("size", [(2, 2), (5, 7), (8, 8)])
def test_plain_images(target: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels of a plain image are turned into blocks first: batches, parts, pixels left over, and
    an output whose pixels are stored side by side."""
    monkeypatch.setattr(conv_deep_plan, "_MOST_PIXELS", 21)
    monkeypatch.setattr(conv_deep_plan, "_few", lambda *_: 0)
    monkeypatch.setattr(conv_direct_plan, "cost", lambda *_, **__: float("inf"))
    b = Builder(0)
    x = b.input(b.random(2, 48, *size))
    y = b.op(aten.relu.default, b.conv(x, 21, (1, 1)))
    z = b.op(aten.silu.default, b.conv(x, 29, (1, 1)))
    b.returns(b.conv(y, 4, (1, 1)), z, b.conv(x, 48, (1, 1)))
    program = check(b, target=_with_panels(_without_cache(target), 1024), tolerance=5e-6)
    assert origins(program).count("conv_deep") == 3, origins(program)
    assert all(program.buffers[name].layout == "plain" for name in ("y1", "y2"))


@pytest.mark.parametrize("target", ["host", "arm"])
@pytest.mark.parametrize("threads", [1, 2])
def test_linear_in_parts(target: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_deep_plan, "_MOST_PIXELS", 40)
    b = Builder(0)
    x = b.input(b.random(1, 77, 96))
    y = b.op(aten.linear.default, x, b.constant(b.random(52, 96)), b.constant(b.random(52)))
    b.returns(b.op(aten.gelu.default, y))
    program = check(
        b, target=_with_panels(_without_cache(target), 2048), threads=threads, tolerance=5e-6
    )
    assert origins(program) == ["gemm_deep"]


def test_chosen_where_weights_are_many() -> None:
    target = get_target("x86-64-v3")

    def deep(spec: ConvSpec) -> conv_deep_plan.DeepPlan | None:
        return conv_deep_plan.plan(spec, target.isa, target.l2_bytes)

    def direct_cost(spec: ConvSpec) -> float:
        plan = conv_direct_plan.plan(spec, target.isa, target.l2_bytes)
        return conv_direct_plan.cost(plan, target.isa)

    last = ConvSpec(1, 1, 512, 512, (14, 14), (7, 7), (3, 3), (2, 2), (1, 1))
    plan = deep(last)
    assert plan is not None
    # Measured 0.94 of the peak beside 0.64.
    assert conv_deep_plan.cost(plan, target.isa) < 0.8 * direct_cost(last)
    # Weights that stay in the cache; channels of no whole block.
    assert deep(dataclasses.replace(last, icg=64, ocg=64)) is None
    assert deep(dataclasses.replace(last, icg=515)) is None
    assert deep(dataclasses.replace(last, groups=2)) is None
    assert deep(ConvSpec(1, 1, 4096, 4096, (1, 1), (1, 1), (1, 1))) is None


def test_few_weights_where_one_block_holds_all_pixels() -> None:
    target = get_target("x86-64-v3")

    def deep(depth: int, out: int, pixels: int) -> conv_deep_plan.DeepPlan | None:
        spec = ConvSpec(1, 1, depth, out, (1, pixels), (1, pixels), (1, 1))
        return conv_deep_plan.plan(spec, target.isa, target.l2_bytes)

    for depth, out, pixels in ((384, 64, 196), (384, 48, 169), (200, 80, 196), (672, 160, 49)):
        plan = deep(depth, out, pixels)
        assert plan is not None
        assert plan.tasks >= 16
        assert plan.blocks.size >= 16
        # Not one block of channels after the other where their number has no small divisor.
        assert plan.part_depth >= 128
    assert deep(64, 64, 196) is None
    assert deep(192, 64, 784) is None


@pytest.mark.parametrize(
    ("target", "threads", "out"), [("x86-64-v3", 2, 48), ("x86-64-v4", 2, 96), ("arm", 1, 48)]
)
def test_blocks_of_two_sizes_shared_by_tasks(target: str, threads: int, out: int) -> None:
    b = Builder(3)
    x = b.conv(b.input(b.random(1, 3, 13, 13)), 384, (1, 1))
    y = b.op(aten.relu.default, b.conv(x, out, (1, 1)))
    b.returns(b.conv(b.op(aten.add.Tensor, y, y), 4, (1, 1)))
    program = check(b, target=target, threads=threads, tolerance=5e-6)
    assert origins(program)[1] == "conv_deep"
    assert program.steps[1].tasks >= 16


@pytest.mark.parametrize("target", ["host", "arm"])
def test_rows_of_pixels_of_an_image(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was gathered is stored in vectors of pixels that go over the ends of rows."""
    monkeypatch.setattr(conv_direct_plan, "cost", lambda *_, **__: float("inf"))
    b = Builder(4)
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 13, 11)), 48, (1, 1)))
    y, z = (b.conv(x, 29, (3, 3), stride=2, padding=1) for _ in range(2))
    other = b.input(b.random(*G.shape(y)))
    b.returns(b.op(aten.silu.default, y), b.op(aten.add.Tensor, z, other))
    program = check(b, target=_with_panels(_without_cache(target), 1024), tolerance=5e-6)
    assert origins(program)[1:] == ["conv_deep", "conv_deep"]


def test_plain_images_whose_lines_do_not_fit_the_first_cache() -> None:
    """Few pixels of many channels take a cache line each: 68 GFLOP/s for 96 in blocks."""
    target = get_target("x86-64-v3")

    def first(channels: int, out: int, pixels: int) -> str:
        spec = ConvSpec(1, 1, channels, out, (1, pixels), (1, pixels), (1, 1))
        return products(spec, target, plain=True)[0].origin.split()[0]

    assert first(464, 1024, 49) == "conv_deep"
    assert first(232, 232, 49) == "conv_deep"
    assert first(128, 128, 196) == "conv_direct"


def test_gathers_few_pixels_once() -> None:
    """Every group of channels would gather them again; weights are read again instead."""
    target = get_target("x86-64-v3")

    def strided(size: int, out: int, kernel: int) -> conv_deep_plan.DeepPlan | None:
        half = (size + 1) // 2
        spec = ConvSpec(1, 1, 256, out, (size, size), (half, half), (kernel, kernel), (2, 2),
                        (kernel // 2, kernel // 2))  # fmt: skip
        return conv_deep_plan.plan(spec, target.isa, target.l2_bytes)

    for size, blocks, groups in ((14, 1, 4), (20, 2, 2), (26, 4, 1), (28, 4, 1), (56, 16, 1)):
        plan = strided(size, 512, 3)
        assert plan is not None
        assert plan.gathers
        assert (plan.blocks.count, plan.groups) == (blocks, groups)
        assert plan.blocks.size <= 64
    # One tap is gathered fast: where direct convolution would read weights from the second level.
    assert strided(28, 512, 1) is not None
    assert strided(28, 128, 1) is None
    assert strided(28, 80, 3) is None


@pytest.mark.parametrize("target", ["host", "arm"])
def test_gathered_blocks_of_two_sizes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_deep_plan, "_few", lambda *_: 0)
    monkeypatch.setattr(conv_direct_plan, "cost", lambda *_, **__: float("inf"))
    b = Builder(5)
    image = b.input(b.random(2, 16, 15, 13))
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 29, 25)), 16, (1, 1)))
    y = b.op(aten.silu.default, b.conv(x, 48, (3, 3), stride=2, padding=1))
    z = b.op(aten.relu.default, b.conv(image, 48, (1, 1)))
    b.returns(b.conv(b.op(aten.add.Tensor, y, z), 8, (1, 1)))
    program = check(b, target=_with_panels(_without_cache(target), 256), tolerance=5e-6)
    assert origins(program).count("conv_deep") == 3
    tasks = [step.tasks for step in program.steps if step.kernel.origin.startswith("conv_deep")]
    assert tasks[:2] == [2 * 4, 2 * 4], "195 pixels in four blocks"
