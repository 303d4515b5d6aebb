"""Winograd convolution: exact transforms, small errors, every size of image and channel count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from graphopt.backends.kernels import winograd_choice as winograd
from graphopt.backends.kernels import winograd_transforms
from graphopt.backends.kernels.conv_spec import ConvSpec
from graphopt.backends.kernels.winograd_plan import WinogradPlan
from graphopt.backends.target import get_target
from tests.backends.harness import Builder, aten, check, origins


@pytest.mark.parametrize(
    ("m", "kernel", "outputs"),
    [
        (m, kernel, outputs)
        for kernel in range(1, 10)
        for m in winograd_transforms.sizes(kernel, 10)
        for outputs in range(1, m + 1)
    ],
)
def test_transforms_are_exact_over_the_rationals(m: int, kernel: int, outputs: int) -> None:
    """Aᵀ (G g ⊙ Bᵀ d) is the correlation, for every unit vector, without rounding.

    Smaller tiles use weights that were transformed for the whole one.
    """
    a_t, g, b_t = winograd_transforms.transforms(m, kernel, outputs)
    whole = winograd_transforms.transforms(m, kernel)[1]
    assert list(g) == [whole[place] for place in winograd_transforms.kept(m, kernel, outputs)]
    for i in range(kernel):
        for j in range(outputs + kernel - 1):
            weight = [row[i] for row in g]
            data = [row[j] for row in b_t]
            result = [
                sum((a * w * d for a, w, d in zip(row, weight, data, strict=True)), Fraction(0))
                for row in a_t
            ]
            assert result == [Fraction(int(j == k + i)) for k in range(outputs)]


def test_operations_of_the_transforms() -> None:
    """Lavin and Gray count 32 for F(2×2)'s input and 24 for its output."""
    back, _, into = winograd_transforms.transforms(2, 3)
    assert winograd_transforms.operations(into, into) == 32
    assert winograd_transforms.operations(back, back) == 24


def _error(m: tuple[int, int], kernel: tuple[int, int]) -> float:
    """Root mean square error of F(m, kernel) in float32 on normal data, beside the result's."""
    matrices = [
        [
            np.array([[float(v) for v in row] for row in t])
            for t in winograd_transforms.transforms(*n)
        ]
        for n in zip(m, kernel, strict=True)
    ]
    (a, a2), (g, g2), (b, b2) = zip(*matrices, strict=True)
    rng = np.random.default_rng(0)
    d, k = rng.standard_normal((500, len(b), len(b2))), rng.standard_normal((500, *kernel))
    exact = sum(
        k[:, i : i + 1, j : j + 1] * d[:, i : i + m[0], j : j + m[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    )
    spectrum = np.float32(np.einsum("ai,nij,bj->nab", g, k, g2))
    a, a2, b, b2 = (np.float32(each) for each in (a, a2, b, b2))
    inputs = np.einsum("naj,bj->nab", np.einsum("ai,nij->naj", b, np.float32(d)), b2)
    out = np.einsum("naj,bj->nab", np.einsum("ai,nij->naj", a, spectrum * inputs), a2)
    return float(np.sqrt(((out - exact) ** 2).mean() / (exact**2).mean()))


@pytest.mark.parametrize(
    ("m", "usual", "share"), [(3, (0, 1, -1, 2), 0.85), (4, (0, 1, -1, 2, -2), 0.65)]
)
def test_the_points_are_better_than_the_usual_ones(
    m: int, usual: tuple[int, ...], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _error((m, m), (3, 3))
    monkeypatch.setitem(winograd_transforms._POINTS, m + 2, usual)
    winograd_transforms.transforms.cache_clear()
    theirs = _error((m, m), (3, 3))
    winograd_transforms.transforms.cache_clear()
    assert ours < share * theirs


@pytest.mark.parametrize(
    ("m", "kernel", "most"),
    [
        ((2, 2), (3, 3), 1.3e-7), ((4, 4), (3, 3), 4.5e-7), ((1, 6), (1, 3), 4e-7),
        ((1, 8), (1, 3), 1e-6), ((1, 4), (1, 7), 1.1e-6), ((2, 2), (5, 5), 5e-7),
        ((4, 4), (5, 5), 1.7e-6), ((5, 5), (4, 4), 1.7e-6), ((2, 2), (7, 7), 2.2e-6),
    ],
)  # fmt: skip
def test_errors(m: tuple[int, int], kernel: tuple[int, int], most: float) -> None:
    """Of large tiles; F(6×6,3×3), with four times the error of F(4×4,3×3), is none of them."""
    assert m[0] in {n for n, _ in winograd._tiles(kernel)}
    assert _error(m, kernel) < most


@settings(max_examples=5, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    st.lists(
        st.tuples(
            st.integers(1, 2), st.integers(1, 33), st.integers(1, 40), st.integers(1, 23),
            st.integers(1, 23), st.integers(0, 2), st.integers(0, 2), st.sampled_from([2, 3, 4]),
        ).filter(lambda c: c[3] + 2 * c[5] >= 3 and c[4] + 2 * c[6] >= 3 and c[1] * c[2] > 1),
        min_size=2, max_size=2,
    )
)  # fmt: skip
def test_any_size(cases: list[tuple[int, ...]]) -> None:
    """Odd images, ragged channels, paddings, batches; Winograd forced whatever it costs.

    But for one channel to one, which is depthwise.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
        for batch, channels, out, height, width, pad_h, pad_w, m in cases:
            patch.setattr(winograd, "sizes", lambda *_, m=m: (m,))
            b = Builder(height)
            x = b.conv(b.input(b.random(batch, 3, height, width)), channels, (1, 1))
            y = b.conv(x, out, (3, 3), padding=[pad_h, pad_w])
            b.returns(b.conv(b.op(aten.silu.default, y), 4, (1, 1)))
            # Sums of transformed terms cancel: some ten roundings more than a direct sum.
            program = check(b, tolerance=2e-5)
            assert origins(program)[1] == "winograd"
            patch.undo()
            patch.setattr(winograd, "direct_cost", lambda *_: float("inf"))


@pytest.mark.parametrize(
    ("target", "threads", "batch", "height", "width", "m"),
    [
        ("host", 1, 1, 14, 14, 4), ("host", 2, 3, 7, 7, 2), ("host", 1, 2, 13, 15, 4),
        ("host", 1, 4, 3, 9, 4), ("host", 2, 2, 8, 5, 3), ("arm", 1, 1, 14, 11, 4),
        ("arm", 2, 2, 7, 6, 2),
    ],
)  # fmt: skip
def test_smaller_tiles_where_the_image_ends(
    target: str, threads: int, batch: int, height: int, width: int, m: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    candidates = winograd._candidates
    found: list[WinogradPlan] = []

    def only(*sizes: Any) -> Iterator[WinogradPlan]:
        for plan in candidates(*sizes):
            if plan.images and plan.m == (m, m):
                found.append(plan)
                yield plan

    monkeypatch.setattr(winograd, "_candidates", only)
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(height)
    x = b.conv(b.input(b.random(batch, 3, height, width)), 40, (1, 1))
    y = b.op(aten.relu.default, b.conv(x, 72, (3, 3), padding=1))
    z = b.op(aten.silu.default, b.conv(y, 24, (3, 3), padding=1))
    b.returns(b.conv(z, 4, (1, 1)))
    program = check(b, tolerance=2e-5, target=target, threads=threads)
    assert origins(program)[1:3] == ["winograd", "winograd"]
    for plan in found:
        whole = plan.grid[0] * plan.grid[1] * (m + 2) ** 2 * batch * plan.spec.icg * plan.spec.ocg
        assert plan.multiply_adds < whole


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("target", ["host", "arm"])
def test_chosen_where_it_pays(target: str, threads: int) -> None:
    b = Builder(1)
    x = b.conv(b.input(b.random(1, 3, 30, 30)), 64, (1, 1))
    y = b.op(aten.relu.default, b.conv(x, 64, (3, 3), padding=1))
    z = b.op(aten.add.Tensor, b.conv(y, 64, (3, 3), padding=1), x)
    strided = b.conv(z, 16, (3, 3), stride=2, padding=1)
    b.returns(strided)
    program = check(b, tolerance=1e-5, target=target, threads=threads)
    assert origins(program) == ["conv_direct", "winograd", "winograd", "conv_direct"]


def test_cut_for_the_cores_there_are() -> None:
    """Every group of output channels transforms the inputs again: no more of them than cores."""
    spec = ConvSpec(1, 1, 256, 256, (14, 14), (14, 14), (3, 3), padding=(1, 1))
    target = get_target("x86-64-v3")
    tasks = [
        winograd.plans(spec, target.isa, target.l2_bytes, cores)[0].tasks for cores in (1, 2, 4)
    ]
    assert tasks[0] <= tasks[1] == 2
    assert tasks[2] == 4


def test_smaller_weights_where_the_time_is_nearly_the_same() -> None:
    """256 channels at 14×14: F(3×3)'s weights are 6.6 MB, F(4×4)'s 9.4."""
    spec = ConvSpec(1, 1, 256, 256, (14, 14), (14, 14), (3, 3), padding=(1, 1))
    target = get_target("x86-64-v3")
    first, *others = winograd.plans(spec, target.isa, target.l2_bytes, 2)
    fastest = min(winograd.cost(plan, target.isa, target.l2_bytes) for plan in others)
    assert first.m == (3, 3)
    assert fastest < winograd.cost(first, target.isa, target.l2_bytes) < 1.08 * fastest


def test_not_chosen_where_weights_would_only_stream() -> None:
    """512 channels at 7×7: F(4×4) quadruples nine megabytes of weights for four tiles."""
    spec = ConvSpec(1, 1, 512, 512, (7, 7), (7, 7), (3, 3), padding=(1, 1))
    target = get_target("x86-64-v3")
    plan = winograd.plan(spec, target.isa, target.l2_bytes)
    assert plan.m == (2, 2)
    stem = dataclasses.replace(spec, icg=8, ocg=8)
    tiny = winograd.plan(stem, target.isa, target.l2_bytes)
    assert winograd.cost(tiny, target.isa, target.l2_bytes) > 0


def test_lanes_of_four_channels() -> None:
    """NEON takes a tile's channels in fours; those behind the last whole block come one by one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
        b = Builder(2)
        x = b.input(b.random(2, 3, 11, 13))
        for channels, out in ((13, 24), (32, 40), (7, 9)):
            y = b.conv(b.conv(x, channels, (1, 1)), out, (3, 3), padding=1)
            b.returns(b.conv(b.op(aten.relu.default, y), 4, (1, 1)))
        program = check(b, tolerance=2e-5, target="arm")
        assert origins(program).count("winograd") == 3


@pytest.mark.parametrize(
    ("target", "threads", "groups", "wide", "out"),
    [
        ("x86-64-v3", 2, 2, 16, 24), ("x86-64-v3", 1, 3, 8, 8), ("x86-64-v4", 2, 2, 32, 48),
        ("x86-64-v4", 1, 3, 16, 16), ("arm", 1, 2, 16, 8), ("x86-64-v2", 1, 2, 8, 16),
    ],
)  # fmt: skip
def test_groups(
    target: str, threads: int, groups: int, wide: int, out: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group of whole blocks on its own, between other layers, with bias and epilogue."""
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(groups)
    x = b.op(aten.relu.default, b.conv(b.input(b.random(2, 3, 13, 9)), groups * wide, (1, 1)))
    y = b.op(aten.silu.default, b.conv(x, groups * out, (3, 3), padding=1, groups=groups))
    b.returns(b.conv(b.op(aten.add.Tensor, y, y), 4, (1, 1)))
    program = check(b, target=target, threads=threads, tolerance=2e-5)
    assert origins(program)[1] == "winograd"
    assert program.steps[1].tasks % groups == 0


def test_groups_of_no_whole_blocks_are_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(0)
    x = b.conv(b.input(b.random(1, 3, 9, 9)), 24, (1, 1))
    b.returns(b.conv(b.conv(x, 24, (3, 3), padding=1, groups=2), 4, (1, 1)))
    assert origins(check(b, tolerance=1e-5))[1] == "conv_direct"


@pytest.mark.parametrize(
    ("target", "kernel", "dilation", "padding", "size"),
    [
        ("host", (5, 5), (1, 1), (2, 2), (13, 15)), ("host", (1, 3), (1, 1), (0, 1), (5, 9)),
        ("host", (3, 1), (1, 1), (1, 0), (11, 1)), ("host", (2, 2), (1, 1), (1, 0), (9, 12)),
        ("host", (4, 3), (1, 1), (1, 2), (8, 7)), ("host", (5, 1), (1, 1), (0, 0), (12, 6)),
        ("host", (3, 3), (2, 2), (2, 2), (12, 16)), ("host", (3, 3), (3, 2), (1, 2), (14, 9)),
        ("host", (3, 3), (6, 6), (6, 6), (13, 7)), ("host", (1, 5), (1, 3), (0, 6), (1, 500)),
        ("host", (3, 3), (1, 1), (1, 1), (4, 450)), ("arm", (5, 5), (1, 1), (2, 2), (9, 10)),
        ("arm", (3, 3), (2, 2), (3, 1), (11, 12)), ("x86-64-v2", (1, 3), (1, 2), (0, 2), (3, 30)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("batch", [1, 2])
def test_other_kernels_and_dilation(
    target: str, kernel: tuple[int, int], dilation: tuple[int, int], padding: tuple[int, int],
    size: tuple[int, int], batch: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Rows or columns alone, phases of equal and of different sizes, paddings off a phase."""
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(kernel[0])
    x = b.conv(b.input(b.random(batch, 3, *size)), 24, (1, 1))
    y = b.conv(x, 40, kernel, padding=list(padding), dilation=list(dilation))
    b.returns(b.conv(b.op(aten.silu.default, y), 4, (1, 1)))
    program = check(b, tolerance=2e-5, target=target, threads=2)
    assert origins(program)[1] == "winograd"


@pytest.mark.parametrize(
    ("target", "batch", "kernel", "stride", "padding", "size", "groups"),
    [
        ("host", 1, (3, 3), (2, 2), (1, 1), (14, 19), 1),
        ("host", 3, (3, 3), (2, 2), (0, 0), (15, 8), 1),
        ("host", 1, (3, 3), (2, 2), (1, 1), (29, 31), 2),
        ("host", 2, (5, 5), (2, 2), (2, 2), (13, 16), 1),
        ("host", 1, (4, 4), (2, 2), (1, 1), (12, 17), 1),
        ("host", 1, (7, 7), (2, 2), (3, 3), (20, 15), 1),
        ("host", 2, (3, 3), (2, 1), (1, 1), (9, 11), 1),
        ("host", 1, (1, 3), (1, 2), (0, 1), (5, 21), 1),
        ("host", 1, (3, 2), (2, 2), (1, 0), (13, 10), 1),
        ("host", 2, (5, 4), (3, 3), (0, 2), (17, 23), 1),
        ("host", 1, (3, 1), (2, 2), (1, 0), (13, 10), 1),
        ("arm", 2, (3, 3), (2, 2), (1, 1), (11, 14), 1),
        ("x86-64-v2", 1, (3, 3), (2, 2), (1, 1), (10, 9), 2),
        ("x86-64-v3", 1, (3, 3), (2, 2), (1, 1), (27, 9), 1),
    ],
)
@pytest.mark.parametrize("largest", [False, True])
def test_strides(
    target: str, batch: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], size: tuple[int, int], groups: int, largest: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Parts of a kernel with as many taps and with one less, rows or columns alone."""
    tiles = winograd._tiles
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    monkeypatch.setattr(winograd, "_tiles", lambda taps: [sorted(tiles(taps))[-largest]])
    b = Builder(kernel[0])
    x = b.conv(b.input(b.random(batch, 3, *size)), 16 * groups, (1, 1))
    y = b.conv(x, 24 * groups, kernel, padding=list(padding), stride=list(stride), groups=groups)
    b.returns(b.conv(b.op(aten.silu.default, y), 4, (1, 1)))
    program = check(b, tolerance=2e-5, target=target, threads=2)
    assert origins(program)[1] == "winograd"


@pytest.mark.parametrize(
    ("target", "batch", "channels", "kernel", "stride", "padding", "size"),
    [
        ("host", 1, 3, (7, 7), (2, 2), (3, 3), (38, 44)),
        ("host", 2, 3, (7, 7), (2, 2), (3, 3), (21, 17)),
        ("host", 1, 3, (11, 11), (4, 4), (2, 2), (48, 45)),
        ("host", 1, 4, (5, 7), (2, 3), (0, 3), (23, 31)),
        ("host", 3, 1, (6, 6), (2, 2), (2, 2), (16, 13)),
        ("host", 1, 5, (3, 3), (1, 1), (1, 1), (9, 12)),
        ("host", 2, 11, (3, 3), (2, 1), (1, 0), (10, 8)),
        ("host", 1, 3, (3, 3), (2, 2), (1, 1), (1, 9)),
        ("host", 1, 2, (1, 10), (1, 5), (0, 3), (1, 57)),
        ("host", 1, 2, (7, 1), (2, 1), (3, 0), (23, 1)),
        ("arm", 1, 3, (7, 7), (2, 2), (3, 3), (17, 20)),
        ("arm", 2, 3, (11, 11), (4, 4), (2, 2), (27, 31)),
        ("x86-64-v2", 1, 3, (7, 7), (2, 2), (3, 3), (17, 20)),
        ("x86-64-v3", 1, 3, (7, 7), (2, 2), (3, 3), (26, 25)),
    ],
)
def test_plain_inputs(
    target: str, batch: int, channels: int, kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], size: tuple[int, int], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """First layers: pixels of a stride's windows for channels, windows that the image cuts."""
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(kernel[1])
    x = b.input(b.random(batch, channels, *size))
    y = b.conv(x, 24, kernel, padding=list(padding), stride=list(stride))
    b.returns(b.conv(b.op(aten.silu.default, y), 4, (1, 1)))
    program = check(b, tolerance=2e-5, target=target, threads=2)
    assert origins(program)[0] == "winograd"


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 32, 13, 17), (3, 3), {"groups": 2, "padding": [1, 1], "stride": [2, 2]}),
        ((2, 16, 15, 12), (3, 3), {"dilation": [2, 2], "padding": [2, 2]}),
        ((1, 16, 4, 9, 11), (3, 3, 3), {"padding": [0, 1, 1], "stride": [1, 2, 2]}),
        ((2, 6, 51), (8,), {"padding": [1], "stride": [4]}),
    ],
)
def test_plain_inputs_of_other_convolutions(
    shape: tuple[int, ...], kernel: tuple[int, ...], options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Groups, dilation and frames, whose windows are no channels, and one dimension."""
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(len(shape))
    y = b.conv(b.input(b.random(*shape)), 32, kernel, **options)
    b.returns(b.conv(b.op(aten.silu.default, y), 4, (1,) * len(kernel)))
    assert origins(check(b, tolerance=2e-5, threads=2))[0] == "winograd"


def test_strides_of_the_resnets() -> None:
    """3×3 with stride 2: faster than direct, but not for eight more megabytes on 7×7."""
    target = get_target("x86-64-v3")
    isa, l2_bytes = target.isa, target.l2_bytes
    chosen = []
    for channels in (64, 128, 256):
        size = 3584 // channels
        spec = ConvSpec(1, 1, channels, 2 * channels, (size, size), (size // 2, size // 2), (3, 3),
                        stride=(2, 2), padding=(1, 1))  # fmt: skip
        best = winograd.plan(spec, isa, l2_bytes)
        chosen.append(winograd.pays(best, 1, [spec], isa, l2_bytes))
        assert best.operations < 0.8 * spec.flops
    assert chosen == [True, True, False]


@pytest.mark.parametrize(
    ("stride", "dilation", "channels"), [((2, 2), (2, 2), 16), ((2, 2), (1, 1), 12)]
)
def test_strides_that_are_direct(
    stride: tuple[int, int], dilation: tuple[int, int], channels: int
) -> None:
    """With dilation, and where the channels are no whole blocks."""
    spec = ConvSpec(1, 1, channels, 16, (20, 20), (9, 9), (3, 3), stride, dilation=dilation)
    assert not winograd.supports(spec, 8)
    assert winograd.supports(dataclasses.replace(spec, icg=16, dilation=(1, 1)), 8)


def test_one_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(winograd, "direct_cost", lambda *_: float("inf"))
    b = Builder(1)
    x = b.conv(b.input(b.random(2, 3, 131)), 24, (1,))
    y = b.conv(x, 40, (3,), padding=[4], dilation=[4])
    b.returns(b.conv(b.op(aten.relu.default, y), 4, (1,)))
    assert origins(check(b, tolerance=2e-5))[1] == "winograd"
