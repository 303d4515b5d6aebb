"""Choosing register tiles: how many vectors of output channels by how many pixels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from graphopt.backends.isa.base import Isa

LINE = 16
"""Floats in a cache line."""
_FMA_LATENCY = 4
_LOADS = 1.7
"""Loads per cycle that kernels reach in practice: 8×9 to 8×13 tiles, a load and more for each
multiply-add, run at 0.75 to 0.88 of the peak where 16×4 and 16×6 run at 0.98."""
_MOST_CHANNELS = 64
"""Channels of a tile whose vectors are small; never less than eight vectors."""
TOGETHER = 4
"""Vectors of results, which leave a few registers for each. Elementwise functions are long chains
of dependent instructions: one after the other they wait in the processor's queues."""
MOST_PIXELS = 16
"""Pixels of a tile, at most."""
_FEWEST_APART = 6
"""Pixels of a tile that are not worth avoiding even where their inputs meet in the cache."""
_FEW_TILES = 3
"""Tiles worth measuring beside each other."""


@dataclass(frozen=True)
class Tile:
    """A register tile: `vectors` channel blocks by `pixels` outputs."""

    vectors: int
    pixels: int


@dataclass(frozen=True)
class Split:
    """`total` items cut into `count` pieces of `size`, the last ones of `size - 1`.

    `large` pieces have the full size. Cutting evenly leaves no small remainder piece, which would
    run far below the peak.
    """

    total: int
    size: int
    count: int
    large: int

    def kinds(self) -> list[tuple[int, int, int, int]]:
        """The pieces of each size: (size, first item, number of the first piece, how many)."""
        both = [
            (self.size, 0, 0, self.large),
            (self.size - 1, self.large * self.size, self.large, self.count - self.large),
        ]
        return [kind for kind in both if kind[-1]]


def split(total: int, size: int) -> Split:
    """Cut `total` into the fewest even pieces of at most `size`."""
    count = -(-total // size)
    size = -(-total // count)
    return Split(total, size, count, total - count * (size - 1))


def choose_tile(blocks: int, pixels: int, isa: Isa) -> Tile:
    """The tile with the least estimated time for `blocks` channel blocks by `pixels` pixels."""
    return best_tiles(blocks, pixels, isa)[0]


def most_apart(apart: int, way_bytes: int, ways: int) -> int:
    """The most pixels of a tile whose inputs lie `apart` bytes from each other.

    Caches keep addresses a multiple of `way_bytes` apart in the same few lines. When 14 rows met
    in one set of eight, a product of 128×3072 by 3072×768 took 6,070 µs instead of 5,330.
    """
    together = ways * way_bytes // gcd(apart, way_bytes)
    return min(MOST_PIXELS, max(_FEWEST_APART, together))


@lru_cache(maxsize=4096)
def best_tiles(blocks: int, pixels: int, isa: Isa, most: int = MOST_PIXELS) -> tuple[Tile, ...]:
    """A few tiles of least estimated time, the best first; of those that cut alike, one.

    A tile's time per multiply-add step is bounded by its multiply-adds, its loads (weights and one
    broadcast per pixel) and the latency of the dependent adds; tiles must fit the registers, and
    have at most `most` pixels.
    """
    found: dict[tuple[int, int], tuple[float, int, int, int]] = {}
    for vectors in range(1, min(blocks, max(8 * isa.wide, _MOST_CHANNELS) // isa.block) + 1):
        for tile_pixels in range(1, min(pixels, most) + 1):
            rows, columns = split(blocks, vectors), split(pixels, tile_pixels)
            if not all(fits(size, tile_pixels, isa) for size, *_ in rows.kinds()):
                continue
            time = 0.0
            for v, nv in ((rows.size, rows.large), (rows.size - 1, rows.count - rows.large)):
                for p, np_ in (
                    (columns.size, columns.large),
                    (columns.size - 1, columns.count - columns.large),
                ):
                    time += nv * np_ * step_time(v, p, isa)
            # Of equal tiles, the one that needs fewer registers for its inputs.
            order = tile_pixels if isa.lane_operand else -tile_pixels
            candidate = (round(time, 6), order, vectors, tile_pixels)
            cut = (rows.size, columns.size)
            found[cut] = min(candidate, found.get(cut, candidate))
    best = sorted(found.values())[:_FEW_TILES]
    return tuple(Tile(vectors, tile_pixels) for _, _, vectors, tile_pixels in best)


def thread_counts(cores: int) -> list[int]:
    """Numbers of threads to share work evenly among: 1, 2 and 4, as far as there are cores."""
    return [n for n in (1, 2, 4) if n <= max(1, cores)]


def unevenness(tasks: int, cores: int) -> float:
    """How much longer than an even share the longest one takes, over these numbers of threads."""
    shares = [-(-tasks // n) * n / tasks for n in thread_counts(cores)]
    return sum(shares) / len(shares)


def places_of(sizes: dict[str, int]) -> dict[str, int]:
    """Where each part of scratch begins, in floats, on a cache line; `end` is where all ends."""
    places, end = {}, 0
    for name, size in sizes.items():
        places[name] = end
        end += -(-size // LINE) * LINE
    return places | {"end": end}


def together(isa: Isa) -> int:
    """Blocks of channels whose long epilogue is computed in turn, a statement of each at a time."""
    return max(1, TOGETHER * isa.narrow // isa.block)


def fits(blocks: int, pixels: int, isa: Isa) -> bool:
    """Whether a tile's accumulators, one step's weights and its inputs stay in registers."""
    # Half a vector makes all of them half ones: see `lanes.vectors_of`.
    vectors, half = divmod(blocks * isa.block, isa.lanes())
    vectors = blocks if half else vectors
    # With multiply-adds by lane the compiler loads each pixel's next inputs as a vector.
    inputs = pixels if isa.lane_operand else 1
    # With every register taken (24×4 on AVX2) kernels lost a quarter of their speed.
    spare = 1 if isa.fma else 2
    return vectors * (pixels + 1) + inputs + spare <= isa.registers


def step_time(blocks: int, pixels: int, isa: Isa) -> float:
    """Cycles one step of the reduction takes on a tile, by the tightest bound."""
    vectors = blocks * isa.block / isa.lanes()
    multiply_adds = vectors * pixels * (1 if isa.fma else 2)
    broadcasts = pixels / 4 if isa.lane_operand else pixels
    # A vector that the core computes one of per cycle it loads one of, too.
    loads = vectors * 2 / isa.multiply_adds + broadcasts
    # A small overhead per step keeps equal bounds apart: fewer, larger tiles amortize the loop.
    return max(multiply_adds / isa.multiply_adds, loads / _LOADS, _FMA_LATENCY) + 0.3
