"""Register tiles fit the registers, cover all channels, and keep rows apart in the cache."""

from __future__ import annotations

import pytest

from graphopt.backends.kernels.lanes import vectors_of
from graphopt.backends.kernels.tiling import best_tiles, fits, most_apart, split
from graphopt.backends.target import get_target
from tests.backends.harness import Builder, aten, check, origins

TARGETS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "cortex-a72")


@pytest.mark.parametrize("name", TARGETS)
def test_tiles_fit_with_all_their_sizes(name: str) -> None:
    """A cut of 14 blocks by four has pieces of three: an odd number of half vectors on AVX-512."""
    isa = get_target(name).isa
    for blocks in range(1, 40):
        for pixels in (1, 3, 14, 49, 196):
            tiles = best_tiles(blocks, pixels, isa)
            assert tiles
            for tile in tiles:
                sizes = [size for size, *_ in split(blocks, tile.vectors).kinds()]
                assert all(fits(size, tile.pixels, isa) for size in sizes), (blocks, tile)


def test_vectors_cover_a_tile() -> None:
    assert vectors_of(32, 16) == [(0, 16), (16, 16)]
    assert vectors_of(24, 16) == [(0, 8), (8, 8), (16, 8)]
    assert vectors_of(16, 8) == [(0, 8), (8, 8)]


def test_rows_that_meet_in_the_cache() -> None:
    """Of 32 KB in eight ways: rows of 12 KB all meet, of 3 KB every fourth, of 1,248 bytes none."""
    assert [most_apart(4 * depth, 4096, 8) for depth in (3072, 1024, 768, 312)] == [8, 8, 16, 16]
    assert most_apart(4 * 4096, 16384, 2) == 6, "smaller tiles would cost more"


@pytest.mark.parametrize(("depth", "rows"), [(1024, 8), (1032, 14)])
def test_linear_keeps_rows_apart(depth: int, rows: int) -> None:
    b = Builder(depth)
    x = b.input(b.random(56, depth))
    b.returns(b.op(aten.linear.default, x, b.constant(b.random(96, depth) / depth**0.5)))
    program = check(b, target="x86-64-v4", tolerance=5e-6)
    assert origins(program) == ["gemm_deep"]
    described = program.steps[0].kernel.origin
    assert int(described.rsplit("×", 1)[1]) <= rows, described
    assert (int(described.rsplit("×", 1)[1]) > 8) == (rows > 8), described
