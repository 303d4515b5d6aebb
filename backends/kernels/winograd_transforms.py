"""The transforms of Winograd convolution: their matrices, and vectors of channels through them.

The matrices are built from interpolation points (Toom–Cook; Winograd, "Arithmetic Complexity of
Computations", 1980), exactly. Opposite points share half their work. They are those with the least
error among fractions of small numbers: 0, ±3/4, ±3/2 gave about half the error of the usual 0, ±1,
±2 (`tests/backends/test_winograd.py` measures both).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

from tvm.tirx.script.builder import ir as T

from graphopt.backends.kernels.builder import f32
from graphopt.ops.opdef import Expr

_POINTS: dict[int, tuple[int | Fraction, ...]] = {
    1: (),
    3: (0, 1),
    4: (0, 1, -1),
    5: (0, Fraction(3, 4), Fraction(-3, 4), 2),
    6: (0, Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2)),
    7: (0, 1, -1, Fraction(1, 2), Fraction(-1, 2), 2),
    8: (0, 1, -1, Fraction(1, 2), Fraction(-1, 2), 2, -2),
    10: (
        0, Fraction(3, 4), Fraction(-3, 4), Fraction(4, 3), Fraction(-4, 3), Fraction(1, 2),
        Fraction(-1, 2), Fraction(5, 2), Fraction(-5, 2),
    ),
}  # fmt: skip
"""By the places of a tile's side, of which infinity is the last."""

Row = tuple[Fraction, ...]
Matrix = tuple[Row, ...]


def sizes(kernel: int, most: int) -> tuple[int, ...]:
    """Outputs of a tile's side of at most so many places; of an axis without a kernel, one."""
    if kernel == 1:
        return (1,)
    return tuple(places - kernel + 1 for places in _POINTS if kernel < places <= most)


@cache
def transforms(m: int, kernel: int, outputs: int | None = None) -> tuple[Matrix, Matrix, Matrix]:
    """The matrices Aᵀ (r × a), G (a × k) and Bᵀ (a × a) of a kernel of k and r outputs, exactly.

    Evaluation at the finite points and at infinity, a = r + k - 1 in all, and the interpolation
    back; the transposition principle turns the product of polynomials into the correlation that a
    convolution layer is. With fewer outputs than m a tile uses the first a - 1 points of F(m) and
    infinity (see `kept`), with weights that were transformed for F(m): what their scale differs by
    is put into Bᵀ.
    """
    r = m if outputs is None else outputs
    size = r + kernel - 1
    whole = [Fraction(p) for p in _POINTS[m + kernel - 1]]
    points = whole[: size - 1]

    def scale(point: Fraction, among: list[Fraction]) -> Fraction:
        return _multiplied(point - q for q in among if q != point)

    def powers(count: int) -> list[list[Fraction]]:
        finite = [[p**k for k in range(count)] for p in points]
        return [*finite, [Fraction(int(k == count - 1)) for k in range(count)]]

    a_t = tuple(zip(*powers(r), strict=True))
    scales = [*(scale(p, whole) for p in points), Fraction(1)]
    g = [tuple(v / by for v in row) for row, by in zip(powers(kernel), scales, strict=True)]
    rows: list[tuple[Fraction, ...]] = []
    for i, p in enumerate(points):
        others = _polynomial([q for k, q in enumerate(points) if k != i])
        by = scale(p, whole) / scale(p, points)
        rows.append((*(by * c for c in others), *[Fraction(0)] * (size - len(others))))
    rows.append(tuple(_polynomial(points)))
    return a_t, tuple(g), tuple(rows)


def kept(m: int, kernel: int, outputs: int) -> tuple[int, ...]:
    """Which of the m + kernel - 1 places of F(m) a tile with so many outputs has."""
    return (*range(outputs + kernel - 2), m + kernel - 2)


def _multiplied(values: Any) -> Fraction:
    result = Fraction(1)
    for value in values:
        result *= value
    return result


def _polynomial(roots: list[Fraction]) -> list[Fraction]:
    """Coefficients, constant first, of the monic polynomial with these roots."""
    result = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *result]
        scaled = [*(-root * c for c in result), Fraction(0)]
        result = [a + b for a, b in zip(shifted, scaled, strict=True)]
    return result


@dataclass(frozen=True)
class _Sums:
    """One row of a product, or two that are the sum and the difference of two others."""

    numbers: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Factored:
    """`matrix · vector` with less work.

    Attributes:
        columns: pairs of items whose sum and difference take their places first.
        sums: the rows, of what is there then.
    """

    columns: tuple[tuple[int, int], ...]
    sums: tuple[_Sums, ...]


@cache
def _factored(matrix: Matrix) -> _Factored:
    columns: list[Row] = list(zip(*matrix, strict=True))
    pairs = tuple(_opposites(columns))
    for i, k in pairs:
        columns[i], columns[k] = _halves(columns[i], columns[k])
    rows: list[Row] = list(zip(*columns, strict=True))
    twins = dict(_opposites(rows))
    sums = [
        _Sums((i, twins[i]), _halves(row, rows[twins[i]])) if i in twins else _Sums((i,), (row,))
        for i, row in enumerate(rows)
        if i not in twins.values()
    ]
    return _Factored(pairs, tuple(sums))


def _opposites(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The pairs of rows that differ only in signs, each row in one pair at most."""
    found: dict[int, int] = {}
    for i, row in enumerate(rows):
        if i in found.values():
            continue
        others = (k for k in range(i + 1, len(rows)) if k not in found.values())
        twin = next((k for k in others if _opposite(row, rows[k])), None)
        if twin is not None:
            found[i] = twin
    return list(found.items())


def _halves(a: Row, b: Row) -> tuple[Row, Row]:
    """Opposite rows as the sum and the difference of two others: those."""
    same = tuple(x if x == y else Fraction(0) for x, y in zip(a, b, strict=True))
    return same, tuple(x - y for x, y in zip(a, same, strict=True))


def _opposite(a: Row, b: Row) -> bool:
    """Whether the rows differ only in signs, with something equal and something opposite."""
    same = [x == y for x, y in zip(a, b, strict=True) if x or y]
    return all(abs(x) == abs(y) for x, y in zip(a, b, strict=True)) and any(same) and not all(same)


def operations(down: Matrix, along: Matrix) -> int:
    """Additions and multiplications of `two_sided` for one channel."""
    return _operations(down) * len(along[0]) + _operations(along) * len(down)


def _operations(matrix: Matrix) -> int:
    product = _factored(matrix)
    count = 2 * len(product.columns)
    for sums in product.sums:
        for row in sums.rows:
            terms = [abs(c) for c in row if c]
            count += len(terms) - 1 + sum(c != 1 for c in terms)
        count += 2 * (len(sums.rows) - 1)
    return count


def two_sided(down: Matrix, along: Matrix, tile: Any, lanes: int, put: Any) -> None:
    """`down · tile · alongᵀ`: down the columns into a second tile, then along its rows."""
    rows, columns = len(down), len(along[0])
    half = T.alloc_buffer((rows * columns * lanes,), "float32", scope="local")

    def put_half(i: int, j: int, lane: Expr, value: Expr) -> None:
        T.buffer_store(half, value, [(i * columns + j) * lanes + lane])

    for j in range(columns):
        _one_sided(down, lanes, lambda k, lane, j=j: tile[(k * columns + j) * lanes + lane],
                   lambda i, lane, value, j=j: put_half(i, j, lane, value))  # fmt: skip
    for i in range(rows):
        _one_sided(along, lanes, lambda k, lane, i=i: half[(i * columns + k) * lanes + lane],
                   lambda j, lane, value, i=i: put(i, j, lane, value))  # fmt: skip


def _one_sided(matrix: Matrix, lanes: int, item: Any, put: Any) -> None:
    """`matrix · vector`: `item` gives an element of the vector, `put` takes one of the product."""
    product = _factored(matrix)
    paired = {number for pair in product.columns for number in pair}
    pairs = T.alloc_buffer((len(matrix[0]) * lanes,), "float32", scope="local")

    def term(k: int, lane: Expr) -> Expr:
        return pairs[k * lanes + lane] if k in paired else item(k, lane)

    for i, k in product.columns:
        with T.vectorized(0, lanes) as lane:
            T.buffer_store(pairs, item(i, lane) + item(k, lane), [i * lanes + lane])
        with T.vectorized(0, lanes) as lane:
            T.buffer_store(pairs, item(i, lane) - item(k, lane), [k * lanes + lane])
    for sums in product.sums:
        if len(sums.rows) == 1:
            with T.vectorized(0, lanes) as lane:
                put(sums.numbers[0], lane, _combine(sums.rows[0], lambda k, at=lane: term(k, at)))
            continue
        halves = T.alloc_buffer((2 * lanes,), "float32", scope="local")
        for half, row in enumerate(sums.rows):
            with T.vectorized(0, lanes) as lane:
                value = _combine(row, lambda k, at=lane: term(k, at))
                T.buffer_store(halves, value, [half * lanes + lane])
        with T.vectorized(0, lanes) as lane:
            put(sums.numbers[0], lane, halves[lane] + halves[lanes + lane])
        with T.vectorized(0, lanes) as lane:
            put(sums.numbers[1], lane, halves[lane] - halves[lanes + lane])


def _combine(coefficients: Row, item: Any) -> Expr:
    """Σ coefficient · item, without the products by 0, 1 and −1."""
    total: Expr | None = None
    # Positive ones first, so that a sum never begins with a negation where it can be avoided.
    order = sorted(range(len(coefficients)), key=lambda k: coefficients[k] < 0)
    for k in order:
        c = coefficients[k]
        if c == 0:
            continue
        term = item(k) if abs(c) == 1 else item(k) * f32(float(abs(c)))
        if total is None:
            total = term if c > 0 else f32(0.0) - term
        else:
            total = total + term if c > 0 else total - term
    return f32(0.0) if total is None else total
