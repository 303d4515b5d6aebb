"""The seven products of Strassen's algorithm: what each multiplies, and what it makes.

Of the variants with seven products this one has the fewest sums (Strassen, "Gaussian Elimination is
not Optimal", 1969; Winograd, "On Multiplication of 2 × 2 Matrices", 1971). The products, in the
order in which they are computed, and the quarters of the result:

    P1 = A11 · B11                      C11 = P1 + P2
    P2 = A12 · B21
    P6 = S2 · T2                        S1 = A21 + A22      T1 = B12 - B11
    P7 = (A11 - A21) · (T2 - B11)       S2 = S1 - A11       T2 = B22 - T1
    P5 = -S1 · -T1                      C22 = (P1 + P6 + P7) + P5
    P3 = (A12 - S2) · (T2 - (-T1))      C12 = (P1 + P6 + P5) + P3
    P4 = A22 · (B21 - T2)               C21 = (P1 + P6 + P7) + P4
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from graphopt.backends.kernels.strassen_plan import KEPT
from graphopt.ops.math import share
from graphopt.ops.opdef import Expr

_NONE = -1
_B11, _B21, _T2, _MINUS_T1 = range(KEPT)


@dataclass(frozen=True)
class Step:
    """One of the products, of the left factor of the same number.

    Attributes:
        right: its factor of weights, or what it is taken from.
        less: the factor of weights that is taken from that.
        start: the partial sum that it is added to.
        keep: the partial sum that this makes.
        row, column: of the quarter of the result that is complete then.
    """

    right: int
    less: int = _NONE
    start: int = _NONE
    keep: int = _NONE
    row: int = _NONE
    column: int = _NONE


BOTH = 4
"""The product that two partial sums want: the first one keeps it, the second one is complete."""
STEPS = (
    Step(_B11, keep=0),
    Step(_B21, start=0, row=0, column=0),
    Step(_T2, start=0, keep=0),
    Step(_T2, less=_B11, start=0, keep=1),
    Step(_MINUS_T1, row=1, column=1),
    Step(_T2, less=_MINUS_T1, start=0, row=0, column=1),
    Step(_B21, less=_T2, start=1, row=1, column=0),
)


def of(step: Expr, name: str) -> Expr:
    """What the table says of a step."""
    *others, last = (getattr(each, name) for each in STEPS)
    value = tirx.const(last, "int32")
    for number, other in reversed(list(enumerate(others))):
        value = tirx.Select(step == number, tirx.const(other, "int32"), value)
    return share(value)
