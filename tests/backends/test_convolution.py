"""Convolutions of every kind against PyTorch: odd sizes, groups, strides, dilations, batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt import graph as G
from graphopt.backends.kernels import conv_direct_plan, conv_finish, winograd_choice
from graphopt.backends.target import get_target
from tests.backends.harness import Builder, aten, check, origins


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, object]:
    """Parameters of a 1-D or 2-D convolution whose output is not empty."""
    rank = draw(st.sampled_from([1, 2, 2]))
    groups = draw(st.sampled_from([1, 1, 2, 3, "depthwise"]))
    if groups == "depthwise":
        groups = channels = out = draw(st.integers(1, 20))
    else:
        channels = groups * draw(st.integers(1, 13))
        out = groups * draw(st.integers(1, 19))
    kernel = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    padding = [draw(st.integers(0, 3)) for _ in range(rank)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(
        max(1, r - 2 * p) + draw(st.integers(0, 12)) for r, p in zip(reach, padding, strict=True)
    )
    return {
        "shape": (draw(st.integers(1, 3)), channels, *size),
        "channels": out,
        "kernel": kernel,
        "stride": [draw(st.integers(1, 3)) for _ in range(rank)],
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(st.lists(convolutions(), min_size=3, max_size=3), st.integers(0, 2**31))
def test_any_convolution(cases: list[dict[str, object]], seed: int) -> None:
    """Three convolutions at a time, each once from plain and once from blocked input."""
    b = Builder(seed)
    for case in cases:
        case = dict(case)
        x = b.input(b.random(*case.pop("shape")))  # type: ignore[misc]
        b.returns(b.conv(x, **case))  # type: ignore[arg-type]
        # A pointwise convolution in front makes the input blocked, one behind the output.
        rank = len(case["kernel"])  # type: ignore[arg-type]
        before = b.conv(x, G.shape(x)[1], (1,) * rank)
        middle = b.op(aten.relu.default, b.conv(before, **case))  # type: ignore[arg-type]
        b.returns(b.conv(middle, 5, (1,) * rank))
    check(b, tolerance=4e-6)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding"),
    [(7, 3, 1, 1), (14, 3, 1, 1), (15, 3, 2, 1), (23, 7, 2, 3), (9, 5, 1, 2), (1, 1, 1, 0)],
)
def test_real_layers_with_residual_and_activation(
    size: int, kernel: int, stride: int, padding: int
) -> None:
    """A block as in real networks: fused into one kernel each, correct at every border."""
    b = Builder(1)
    x = b.input(b.random(2, 24, size, size))
    y = b.conv(x, 40, (1, 1))
    z = b.conv(y, 40, (kernel, kernel), stride=stride, padding=padding)
    shortcut = b.conv(y, 40, (1, 1), stride=stride)
    if G.shape(z) == G.shape(shortcut):
        z = b.op(aten.add.Tensor, z, shortcut)
    z = b.op(aten.hardswish.default, z)
    b.returns(b.conv(z, 30, (1, 1)))
    program = check(b, tolerance=1e-5)
    assert len(program.steps) == 4, [step.ops for step in program.steps]
    assert set(origins(program)) <= {"conv_direct", "winograd"}


@settings(max_examples=4, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2), st.sampled_from([1, 2]), st.integers(1, 40), st.integers(1, 40),
    st.tuples(st.integers(5, 9), st.integers(5, 40)), st.sampled_from([1, 3, 5]), st.integers(1, 2),
    st.integers(0, 2), st.sampled_from([64, 900, 2048]),
)  # fmt: skip
def test_long_epilogues(
    batch: int, groups: int, channels: int, out: int, size: tuple[int, int], kernel: int,
    stride: int, padding: int, band: int,
) -> None:  # fmt: skip
    """Sums wait in bands of any size; whole and ragged blocks, plain and blocked outputs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_finish, "_BAND_BYTES", band)
        b = Builder(out)
        x = b.conv(b.input(b.random(batch, 3, *size)), channels * groups, (1, 1))
        y = b.conv(x, out * groups, (kernel, kernel), stride=stride, padding=padding, groups=groups)
        z = b.op(aten.add.Tensor, b.op(aten.silu.default, y), y)
        b.returns(b.conv(z, 4, (1, 1)), b.op(aten.gelu.default, b.conv(x, out, (1, 1))))
        check(b, tolerance=1e-5)


@pytest.mark.parametrize("size", [(9, 1), (1, 9), (1, 1)])
def test_residual_of_one_row_or_column(size: tuple[int, int]) -> None:
    b = Builder(5)
    x = b.input(b.random(2, 8, *size))
    for channels in (5, 16):
        y = b.op(
            aten.add.Tensor, b.conv(x, channels, (1, 1)), b.input(b.random(2, channels, *size))
        )
        b.returns(b.op(aten.relu.default, y), b.conv(y, 4, (1, 1)))
    check(b)


@pytest.mark.parametrize("act", ["relu", "silu"])
def test_residual_with_padded_channels(act: str) -> None:
    """BlazeFace's blocks: a plain residual is guarded channel by channel, in the lanes of a vector,
    and bound before the activation."""
    b = Builder(4)
    x, z = b.input(b.random(1, 12, 3, 5)), b.input(b.random(1, 3, 3, 5))
    residual = b.op(aten.constant_pad_nd.default, x, [0, 0, 0, 0, 0, 4], 0.0)
    y = b.op(aten.add.Tensor, b.conv(z, 16, (1, 1)), residual)
    b.returns(b.conv(b.op(getattr(aten, act).default, y), 4, (1, 1)))
    program = check(b)
    assert program.steps[0].ops == ("pad", "convolution", "add", act)


@pytest.mark.parametrize("target", ["host", "arm"])
def test_depthwise_with_wide_kernels(target: str) -> None:
    """Columns in the padding at both ends, in every tile of a narrow image; 1-D as in Conformers,
    and two rows at a time."""
    b = Builder(5)
    line = b.conv(b.input(b.random(2, 3, 45)), 13, (1,))
    image = b.conv(b.input(b.random(1, 3, 6, 19)), 13, (1, 1))
    for x, kernel, stride, dilation in (
        (line, (31,), 1, 1), (line, (12,), 3, 2), (line, (32,), 2, 1), (image, (5, 13), 1, 1),
    ):  # fmt: skip
        padding = [k // 2 * dilation for k in kernel]
        y = b.conv(x, 13, kernel, stride=stride, padding=padding, dilation=dilation, groups=13)
        b.returns(b.conv(b.op(aten.silu.default, y), 3, (1,) * len(kernel)))
    program = check(b, target=target, tolerance=4e-6)
    assert origins(program).count("depthwise") == 4


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_depthwise_uses_its_generator(kernel: int, threads: int) -> None:
    b = Builder(2)
    x = b.conv(b.input(b.random(2, 3, 17, 19)), 21, (1, 1))
    for stride in (1, 2):
        y = b.conv(x, 21, (kernel, kernel), stride=stride, padding=kernel // 2, groups=21)
        b.returns(b.conv(b.op(aten.silu.default, y), 8, (1, 1)))
    program = check(b, threads=threads)
    assert origins(program).count("depthwise") == 2


@pytest.mark.parametrize("target", ["host", "x86-64-v2"])
@pytest.mark.parametrize("height", [1, 2, 9, 14])
def test_depthwise_two_rows_at_a_time(height: int, target: str) -> None:
    """Odd and even heights, more padding than rows, none, a dilation that divides the stride, and
    one that does not."""
    b = Builder(height)
    x = b.conv(b.input(b.random(2, 3, height, 13)), 13, (1, 1))
    cases = [(5, 1, 2, 1), (5, 2, 2, 1), (7, 1, 3, 1), (7, 2, 6, 1), (5, 2, 4, 2), (5, 1, 4, 2)]
    if height == 14:
        cases += [(5, 1, 0, 1), (7, 2, 0, 1), (5, 2, 1, 2)]
    for kernel, stride, padding, dilation in cases:
        y = b.conv(x, 13, (kernel, 3), stride=[stride, 1], padding=[padding, 1],
                   dilation=[dilation, 1], groups=13)  # fmt: skip
        y = b.op((aten.relu if padding else aten.silu).default, y)
        b.returns(b.conv(y, 3, (1, 1)))
    program = check(b, target=target, tolerance=5e-6)
    assert origins(program).count("depthwise") == len(cases)


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4"])
def test_depthwise_two_rows_in_many_tasks(target: str) -> None:
    """More than one task for a block of an image, the last with a single row."""
    b = Builder(3)
    x = b.conv(b.input(b.random(1, 3, 31, 40)), 9, (1, 1))
    for stride in (1, 2):
        y = b.conv(x, 9, (7, 7), stride=[1, stride], padding=3, groups=9)
        b.returns(b.conv(b.op(aten.silu.default, y), 3, (1, 1)))
    program = check(b, target=target, threads=2, tolerance=5e-6)
    steps = [step for step in program.steps if step.kernel.origin.startswith("depthwise")]
    assert [step.tasks for step in steps] == [16, 8]


def test_depthwise_by_column() -> None:
    """NEON loads a tile's inputs one after the other: wide and narrow kernels, images narrower
    than a tile, strides wider than the kernel."""
    b = Builder(2)
    x = b.conv(b.input(b.random(2, 3, 9, 31)), 13, (1, 1))
    for kernel, stride, dilation in (
        (3, 1, 1),
        (3, 1, 2),
        (3, 2, 1),
        (5, 2, 2),
        (11, 1, 1),
        (1, 3, 1),
    ):
        y = b.conv(x, 13, (3, kernel), stride=[1, stride], padding=[1, kernel // 2],
                   dilation=[1, dilation], groups=13)  # fmt: skip
        b.returns(b.conv(b.op(aten.relu.default, y), 3, (1, 1)))
    program = check(b, target="arm", tolerance=4e-6)
    assert origins(program).count("depthwise") == 6


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "dilation"),
    [(2, 2, 0, 0, 1), (3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (3, 1, 1, 0, 2), (5, 3, 2, 1, 1)],
)
def test_transposed(
    kernel: int, stride: int, padding: int, output_padding: int, dilation: int, groups: int
) -> None:
    b = Builder(3)
    x = b.conv(b.input(b.random(2, 6, 5, 7)), 12, (1, 1))
    weight = b.constant(b.random(12, 10 // groups, kernel, kernel) / 5)
    y = b.op(
        aten.convolution.default, x, weight, b.constant(b.random(10)), [stride] * 2, [padding] * 2,
        [dilation] * 2, True, [output_padding] * 2, groups,
    )  # fmt: skip
    b.returns(b.op(aten.relu.default, y), b.conv(y, 3, (1, 1)))
    program = check(b, tolerance=4e-6)
    assert origins(program)[1] == ("transposed" if dilation == 1 else "conv_fold")


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7)),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 3), st.integers(1, 4)), st.integers(0, 3), st.integers(0, 2),
    st.sampled_from([(8, 16, 1), (5, 7, 1), (16, 16, 2), (6, 9, 3)]), st.integers(1, 2),
)  # fmt: skip
def test_any_transposed(
    size: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], padding: int,
    output_padding: int, channels: tuple[int, int, int], batch: int,
) -> None:  # fmt: skip
    """Kernels smaller than the stride, paddings as large as the kernel, groups."""
    inside, out, groups = channels
    extra = [min(output_padding, s - 1) for s in stride]
    sizes = zip(size, kernel, stride, extra, strict=True)
    pads = [min(padding, ((n - 1) * s + k + e - 1) // 2) for n, k, s, e in sizes]
    b = Builder(3)
    x = b.conv(b.input(b.random(batch, 3, *size)), inside, (1, 1))
    weight = b.constant(b.random(inside, out // groups, *kernel) / 5)
    y = b.op(
        aten.convolution.default, x, weight, None, list(stride), pads, [1, 1], True, extra, groups
    )
    b.returns(b.conv(b.op(aten.relu.default, y), 3, (1, 1)))
    check(b, tolerance=4e-6)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "out"),
    [((9, 9), [3, 3], 4, 1), ((2, 2), [2, 2], 0, 3), ((6, 3), [2, 3], 2, 2), ((9,), [3], 4, 1)],
)
def test_transposed_to_few_channels(
    kernel: tuple[int, ...], stride: list[int], padding: int, out: int
) -> None:
    """FSRCNN's last layer, and others: the phases are channels of one convolution."""
    b = Builder(11)
    rank = len(kernel)
    pads = [padding if k > 3 else 0 for k in kernel]
    extra = [(2 * p - k) % s for k, s, p in zip(kernel, stride, pads, strict=True)]
    x = b.conv(b.input(b.random(2, 3, *(7, 10)[:rank])), 12, (1,) * rank)
    weight = b.constant(b.random(12, out, *kernel) / 9)
    y = b.op(
        aten.convolution.default, x, weight, b.constant(b.random(out)), stride, pads, [1] * rank,
        True, extra, 1,
    )  # fmt: skip
    residual = b.input(b.random(*G.shape(y)))
    b.returns(b.op(aten.tanh.default, b.op(aten.add.Tensor, y, residual)))
    program = check(b, tolerance=4e-6, threads=2)
    assert program.steps[-1].kernel.origin.startswith("transposed joint conv_direct")


@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "arm"])
def test_deep_products_of_phases(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many weights for few pixels: a GAN's first layers. The phases have taps of two sizes."""
    monkeypatch.setattr(winograd_choice, "pays", lambda *_: False)
    b = Builder(13)
    x = b.conv(b.input(b.random(2, 3, 5, 6)), 256, (1, 1))
    weight = b.constant(b.random(256, 200, 5, 4) / 40)
    y = b.op(
        aten.convolution.default, x, weight, b.constant(b.random(200)), [2, 2], [2, 1], [1, 1],
        True, [1, 0], 1,
    )  # fmt: skip
    b.returns(b.conv(b.op(aten.silu.default, y), 5, (1, 1)))
    # Of a larger cache the weights would not be many.
    small = replace(get_target(target), l2_bytes=512 * 1024)
    program = check(b, tolerance=4e-6, target=small, threads=2)
    assert program.steps[1].kernel.origin.startswith("transposed conv_deep")


@pytest.mark.parametrize(
    ("target", "kernel", "stride", "padding", "channels"),
    [
        ("host", (4, 4), [2, 2], 1, (24, 32)), ("x86-64-v3", (3, 3), [2, 2], 1, (9, 24)),
        ("host", (5, 4), [2, 2], 2, (16, 16)), ("x86-64-v3", (4,), [2], 1, (16, 24)),
        ("x86-64-v3", (6, 6), [3, 2], 2, (8, 8)), ("x86-64-v4", (3, 3), [2, 2], 1, (9, 48)),
        ("x86-64-v4", (6, 6), [3, 2], 2, (16, 16)), ("arm", (4, 4), [2, 2], 1, (24, 32)),
    ],
)  # fmt: skip
def test_transposed_by_winograd(
    target: str, kernel: tuple[int, ...], stride: list[int], padding: int,
    channels: tuple[int, int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All phases are channels of one convolution, whose blocks each belong to one phase."""
    monkeypatch.setattr(winograd_choice, "cost", lambda *_: 0.0)
    b = Builder(12)
    rank, (inside, out) = len(kernel), channels
    extra = [(2 * padding - k) % s for k, s in zip(kernel, stride, strict=True)]
    x = b.conv(b.input(b.random(2, 3, *(7, 10)[:rank])), inside, (1,) * rank)
    weight = b.constant(b.random(inside, out, *kernel) / 9)
    y = b.op(
        aten.convolution.default, x, weight, b.constant(b.random(out)), stride, [padding] * rank,
        [1] * rank, True, extra, 1,
    )  # fmt: skip
    b.returns(b.conv(b.op(aten.silu.default, y), 5, (1,) * rank))
    program = check(b, tolerance=2e-5, target=target, threads=2)
    assert program.steps[1].kernel.origin.startswith("transposed joint winograd")


@pytest.mark.parametrize("target", ["host", "arm"])
def test_padding_of_wide_kernels_is_written_out(target: str) -> None:
    """Once for two layers that read the same; rows keep theirs, and so do narrow kernels."""
    b = Builder(14)
    x = b.conv(b.input(b.random(2, 3, 6, 37)), 16, (1, 1))
    b.returns(
        b.op(aten.relu.default, b.conv(x, 9, (3, 15), padding=[1, 7])),
        b.conv(x, 24, (1, 16), stride=[1, 2], padding=[0, 7], groups=2),
        b.conv(x, 5, (2, 11), padding=[0, 25], dilation=[1, 5]),
        b.conv(x, 5, (1, 9), stride=[1, 2], padding=[0, 8]),
    )
    program = check(b, tolerance=4e-6, target=target, threads=2)
    assert origins(program).count("map") == 2


def test_three_dimensions() -> None:
    """Plain and blocked inputs, frames in the padding, strides and dilations of depth; channels
    that are no whole blocks; 3×3×3 as Winograd, too."""
    b = Builder(4)
    x = b.input(b.random(2, 3, 5, 6, 7))
    y = b.conv(x, 16, (3, 3, 3), padding=1)
    z = b.op(aten.relu.default, b.conv(y, 16, (3, 3, 3), padding=1))
    b.returns(
        b.conv(x, 9, (3, 2, 3), stride=[1, 2, 1], padding=[1, 0, 1]),
        b.conv(z, 9, (3, 2, 3), stride=[2, 2, 1], padding=[1, 0, 1], dilation=[1, 1, 2]),
        b.conv(z, 13, (2, 1, 1), padding=[2, 0, 0], dilation=[3, 1, 1]),
        b.conv(b.conv(z, 13, (1, 1, 1)), 5, (3, 3, 1), padding=[1, 1, 0]),
    )
    program = check(b, threads=2)
    assert set(origins(program)) == {"map", "conv_direct", "winograd"}


def test_deep_products_in_three_dimensions() -> None:
    """Many weights for few pixels: parts of several frames' channels are gathered."""
    b = Builder(10)
    x = b.conv(b.input(b.random(1, 3, 4, 10, 9)), 128, (1, 1, 1))
    y = b.op(aten.relu.default, b.conv(x, 256, (3, 3, 3), stride=2, padding=1))
    b.returns(b.conv(y, 72, (2, 2, 2), padding=[1, 0, 0]), b.conv(y, 256, (1, 1, 1), stride=2))
    program = check(b, tolerance=4e-6)
    assert "conv_deep" in origins(program)


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.tuples(*[st.integers(1, 6)] * 3), st.tuples(*[st.integers(1, 4)] * 3),
    st.tuples(*[st.integers(1, 3)] * 3), st.tuples(*[st.integers(0, 2)] * 3),
    st.tuples(*[st.integers(1, 2)] * 3),
    st.sampled_from([(8, 5, 1), (11, 16, 1), (13, 13, 13), (8, 6, 2)]), st.integers(1, 2),
)  # fmt: skip
def test_any_three_dimensions(
    size: tuple[int, ...], kernel: tuple[int, ...], stride: tuple[int, ...],
    padding: tuple[int, ...], dilation: tuple[int, ...], channels: tuple[int, int, int], batch: int,
) -> None:  # fmt: skip
    """Depthwise, grouped, and in one group; from plain and from blocked inputs."""
    inside, out, groups = channels
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = tuple(max(n, r - 2 * p) for n, r, p in zip(size, reach, padding, strict=True))
    b = Builder(6)
    x = b.input(b.random(batch, inside, *size))
    for source in (x, b.conv(x, inside, (1, 1, 1))):
        y = b.conv(source, out, kernel, stride=list(stride), padding=list(padding),
                   dilation=list(dilation), groups=groups)  # fmt: skip
        b.returns(b.conv(b.op(aten.silu.default, y), 3, (1, 1, 1)))
    check(b, tolerance=4e-6)


def test_depthwise_in_three_dimensions() -> None:
    """X3D's layers; the last of several tasks is short."""
    b = Builder(7)
    x = b.conv(b.input(b.random(1, 3, 4, 21, 40)), 13, (1, 1, 1))
    for kernel, stride in (((3, 3, 3), [1, 2, 2]), ((5, 1, 1), [1, 1, 1]), ((1, 5, 5), [1, 1, 2])):
        padding = [k // 2 for k in kernel]
        y = b.conv(x, 13, kernel, stride=stride, padding=padding, groups=13)
        b.returns(b.conv(b.op(aten.relu.default, y), 3, (1, 1, 1)))
    program = check(b, threads=2, tolerance=4e-6)
    assert origins(program).count("depthwise") == 3


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "output_padding", "groups"),
    [(8, 2, 3, 0, 1), (4, 2, 1, 0, 2), (3, 3, 0, 2, 1), (2, 3, 0, 0, 1)],
)
def test_transposed_in_one_dimension(
    kernel: int, stride: int, padding: int, output_padding: int, groups: int
) -> None:
    """A kernel shorter than the stride leaves outputs that meet no input: the fold's."""
    b = Builder(8)
    x = b.conv(b.input(b.random(2, 3, 19)), 12, (1,))
    weight = b.constant(b.random(12, 10 // groups, kernel) / 5)
    y = b.op(
        aten.convolution.default, x, weight, b.constant(b.random(10)), [stride], [padding], [1],
        True, [output_padding], groups,
    )  # fmt: skip
    b.returns(b.op(aten.tanh.default, y), b.conv(y, 3, (1,)))
    program = check(b, tolerance=4e-6)
    assert origins(program)[1] == ("transposed" if kernel >= stride else "conv_fold")


def test_long_kernels_run_along_the_only_long_axis() -> None:
    """torchcrepe's shape: a (512, 1) kernel over (L, 1)."""
    b = Builder(5)
    x = b.input(b.random(2, 1, 700, 1))
    y = b.op(aten.relu.default, b.conv(x, 24, (512, 1), stride=[4, 1]))
    b.returns(b.conv(y, 8, (1, 1)))
    program = check(b)
    assert origins(program) == ["conv_direct", "conv_direct"]


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
def test_other_instruction_sets(target: str) -> None:
    """The same generators for SSE4.2 (no multiply-add) and NEON."""
    b = Builder(6)
    x = b.input(b.random(1, 3, 13, 11))
    y = b.op(aten.relu.default, b.conv(x, 20, (3, 3), stride=2, padding=1))
    z = b.op(aten.add.Tensor, y, b.conv(y, 20, (3, 3), padding=1, groups=20))
    b.returns(b.conv(z, 13, (1, 1)))
    check(b, target=target, tolerance=4e-6)


@pytest.mark.parametrize("channels", [4, 12, 13, 24])
def test_lanes_of_four_channels(channels: int) -> None:
    """NEON takes a pixel's channels in fours: whole blocks of eight, then four, then one by one."""
    b = Builder(channels)
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 12, 13)), channels, (1, 1)))
    groups = 3 if channels % 24 == 0 else 2 if channels % 2 == 0 else 1
    b.returns(
        b.conv(x, 24, (1, 1)),
        b.conv(b.conv(x, 20, (3, 3), stride=2, padding=1), 5, (1, 1)),
        b.conv(b.conv(x, 16, (2, 5), padding=[1, 3], dilation=[3, 2]), 9, (5, 1)),
        b.conv(b.conv(x, 24, (3, 2), padding=2, groups=groups), 8, (1, 1)),
        b.conv(b.op(aten.relu.default, b.conv(x, 3, (4, 4), stride=4)), 3, (1, 1)),
    )
    program = check(b, target="arm", tolerance=4e-6)
    assert origins(program).count("conv_direct") == 10


def test_lanes_of_four_columns() -> None:
    """NEON takes the columns of a plain image in fours: tiles of every width, images of fewer than
    four columns, kernels in one piece and in several, all of a tile in the padding."""
    b = Builder(11)
    x = b.input(b.random(2, 6, 11, 29))
    narrow = b.input(b.random(2, 3, 5, 3))
    for image, channels, kernel, options in (
        (x, 16, (3, 3), {"stride": 2, "padding": 1}),
        (x, 20, (7, 7), {"stride": 2, "padding": 3}),
        (x, 24, (2, 3), {"dilation": [2, 3], "padding": [1, 5]}),
        (x, 10, (3, 11), {"stride": [1, 4], "padding": [0, 5], "groups": 2}),
        (x, 8, (3, 16), {"stride": [2, 3]}),
        (x, 8, (3, 16), {"stride": [2, 3], "padding": 7}),
        (x, 9, (1, 1), {"padding": [1, 11]}),
        (x, 40, (4, 4), {"stride": 4}),
        (narrow, 16, (3, 3), {"padding": 1}),
        (narrow, 7, (1, 2), {"padding": 2}),
        (narrow, 8, (2, 3), {}),
    ):
        b.returns(b.conv(image, channels, kernel, **options))  # type: ignore[arg-type]
    program = check(b, target="arm", tolerance=4e-6)
    # Of sixteen columns the padding is written out.
    assert sorted(origins(program)) == ["conv_direct"] * 11 + ["map"]


def test_vectors_of_two_blocks() -> None:
    """AVX-512's tiles, on every machine: an odd number of blocks ends with half a vector."""
    b = Builder(10)
    x = b.input(b.random(2, 3, 29, 27))
    y = b.op(aten.relu.default, b.conv(x, 40, (3, 3), stride=2, padding=1))
    z = b.op(aten.add.Tensor, y, b.conv(y, 40, (3, 3), padding=1, groups=40))
    w = b.conv(b.op(aten.silu.default, b.conv(z, 64, (3, 3), padding=1)), 64, (3, 3), padding=1)
    pooled = b.op(aten.mean.dim, w, [2, 3], True)
    b.returns(b.conv(w, 13, (1, 1)), b.conv(pooled, 19, (1, 1)))
    program = check(b, target="x86-64-v4", tolerance=1e-5)
    assert {"depthwise", "winograd"} <= set(origins(program))
    assert {"NCHW8c", "plain"} == {buffer.layout for buffer in program.buffers.values()}
    described = {step.kernel.origin for step in program.steps}
    assert any(origin.startswith("conv_direct 24×") for origin in described), described


def test_sharing_one_kernel_between_equal_layers() -> None:
    b = Builder(7)
    x = b.conv(b.input(b.random(1, 8, 9, 9)), 16, (1, 1))
    for _ in range(3):
        x = b.op(aten.relu.default, b.conv(x, 16, (3, 3), padding=1))
    b.returns(b.conv(x, 8, (1, 1)))
    program = check(b)
    assert len(program.steps) == 5
    assert len({step.kernel.symbol for step in program.steps}) == 3


def test_nan_in_padding_channels_stays_there() -> None:
    """log(0) in the channels that fill up a block must not reach real ones."""
    b = Builder(8)
    x = b.conv(b.input(b.random(1, 3, 4, 5).abs()), 5, (1, 1), bias=False)
    y = b.op(aten.log.default, b.op(aten.abs.default, x))
    b.returns(b.conv(y, 6, (1, 1)), b.op(aten.mean.dim, y, [2, 3], True))
    check(b)


def test_chains_of_transcendental_functions_compile_at_once() -> None:
    """TVM's simplifier took a minute over two of these before bindings became local buffers."""
    b = Builder(9)
    x = b.conv(b.input(b.random(1, 3, 6, 7)), 8, (1, 1))
    for name in ("tanh", "exp", "sigmoid", "log1p", "softplus", "gelu", "silu"):
        x = b.op(getattr(aten, name).default, x)
    b.returns(x)
    check(b)


@pytest.mark.parametrize("target", ["host", "arm"])
@pytest.mark.parametrize(("channels", "groups"), [(24, 1), (13, 1), (26, 2)])
@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_long_epilogues_of_any_number_of_pixels(
    size: tuple[int, int], channels: int, groups: int, target: str
) -> None:
    """Computed in turn for several vectors: what is left over, ragged channels, a sum in place."""
    b = Builder(10)
    x = b.conv(b.input(b.random(2, 4, *size)), channels, (1, 1))
    y = b.conv(x, channels, (1, 1), groups=groups)
    scale = b.op(aten.sigmoid.default, b.op(aten.mean.dim, x, [2, 3], True))
    z = b.op(aten.add.Tensor, b.op(aten.silu.default, b.op(aten.mul.Tensor, y, scale)), x)
    b.returns(b.conv(z, 4, (1, 1)))
    check(b, target=get_target(target))


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.integers(1, 2), st.sampled_from([1, 2]), st.integers(1, 40),
    st.tuples(st.integers(1, 9), st.integers(1, 40)), st.sampled_from([1, 3]), st.integers(1, 2),
    st.sampled_from([64, 900, 2048]),
)  # fmt: skip
def test_rows_of_pixels(
    batch: int, groups: int, out: int, size: tuple[int, int], kernel: int, stride: int, band: int
) -> None:
    """Plain outputs take vectors of neighbouring pixels: any number of them, ragged channels, short
    and long epilogues, a sum, one dimension, tasks that end anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv_finish, "_BAND_BYTES", band)
        patch.setattr(conv_direct_plan, "_TARGET_STEPS", 7 * band)
        b = Builder(out)
        x = b.conv(b.input(b.random(batch, 4, *size)), 8, (1, 1))
        options = {"stride": stride, "padding": kernel // 2, "groups": groups}
        y, z, w = (b.conv(x, out * groups, (kernel, kernel), **options) for _ in range(3))
        other = b.input(b.random(*G.shape(w)))
        line = b.conv(b.input(b.random(batch, 8, size[1])), out * groups, (1,), groups=groups)
        b.returns(
            y, b.op(aten.silu.default, z), b.op(aten.relu.default, b.op(aten.add.Tensor, w, other)),
            line,
        )  # fmt: skip
        check(b, tolerance=1e-5)


@pytest.mark.parametrize("target", ["x86-64-v2", "arm"])
@pytest.mark.parametrize("channels", [2, 3, 13, 16])
def test_rows_of_pixels_of_other_instruction_sets(channels: int, target: str) -> None:
    b = Builder(channels)
    x = b.conv(b.input(b.random(1, 3, 9, 11)), 16, (1, 1))
    b.returns(
        b.conv(x, channels, (3, 3), padding=1),
        b.op(aten.sigmoid.default, b.conv(x, channels, (1, 1))),
    )
    check(b, target=target, tolerance=4e-6)
