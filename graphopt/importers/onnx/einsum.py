"""ONNX Einsum: sums of one operand, and products of two as one batched matrix product."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch

from graphopt.importers.onnx.shape import permute_to, reshape_to
from graphopt.importers.onnx.values import Context, OnnxNode, Refused, Value, dtype, rank, shape

aten = torch.ops.aten


def einsum(ctx: Context, node: OnnxNode) -> Value:
    """The sum over all indices that the result does not name, as Einstein wrote it.

    Of more than two operands the first two are multiplied first, then their product with the third.
    """
    operands = [node.value(i) for i in range(len(node.operands))]
    terms, result = _terms(node.get_str("equation", ""), [rank(x) for x in operands])
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        if len(set(term)) < len(term):
            raise Refused(f"it takes a diagonal: an index is twice in {term}")
        for index, size in zip(term, shape(x), strict=True):
            if sizes.setdefault(index, size) != size:
                raise Refused(f"the index {index} has the sizes {sizes[index]} and {size}")
    term, x = terms[0], operands[0]
    for number in range(1, len(operands)):
        later = "".join([result, *terms[number + 1 :]])
        term, x = _product(ctx, (term, x), (terms[number], operands[number]), later, sizes)
    term, x = _summed(ctx, term, x, result)
    return _ordered(ctx, term, x, result)


def _terms(equation: str, ranks: list[int]) -> tuple[list[str], str]:
    """The operands' indices and the result's, one letter each; those of an ellipsis are digits."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks):
        raise Refused(f"{len(ranks)} operands for the equation {equation}")
    hidden = [dims - len(term.replace("...", "")) for term, dims in zip(terms, ranks, strict=True)]
    hidden = [count if "..." in term else 0 for term, count in zip(terms, hidden, strict=True)]
    most = "0123456789"[: max(hidden)]
    written = [
        term.replace("...", most[len(most) - count :])
        for term, count in zip(terms, hidden, strict=True)
    ]
    if any(len(term) != dims for term, dims in zip(written, ranks, strict=True)):
        raise Refused(f"the equation {equation} does not fit its operands")
    if arrow:
        return written, right.replace("...", most)
    letters = sorted(set(left) - set(",."))
    return written, most + "".join(letter for letter in letters if left.count(letter) == 1)


def _summed(ctx: Context, term: str, x: Value, kept: str) -> tuple[str, Value]:
    """Without the indices that are not in `kept`."""
    axes = [axis for axis, index in enumerate(term) if index not in kept]
    if not axes:
        return term, x
    rest = "".join(index for index in term if index in kept)
    return rest, ctx.op(aten.sum.dim_IntList, x, axes, False, dtype=dtype(x))


def _ordered(ctx: Context, term: str, x: Value, wanted: str) -> Value:
    return permute_to(ctx, x, tuple(term.index(index) for index in wanted))


def _product(
    ctx: Context, a: tuple[str, Value], b: tuple[str, Value], later: str, sizes: dict[str, int]
) -> tuple[str, Value]:
    """Two operands' product, with indices in any order: [batch…, left…] and [batch…, right…].

    What only one of them has, and nobody needs later, is summed before.
    """
    a = _summed(ctx, *a, later + b[0])
    b = _summed(ctx, *b, later + a[0])
    batch = "".join(index for index in a[0] if index in b[0] and index in later)
    summed = "".join(index for index in a[0] if index in b[0] and index not in later)
    left = "".join(index for index in a[0] if index not in b[0])
    right = "".join(index for index in b[0] if index not in a[0])

    def size(indices: str) -> list[int]:
        return [sizes[index] for index in indices]

    def matrix(operand: tuple[str, Value], rows: str, columns: str) -> Value:
        turned = _ordered(ctx, *operand, batch + rows + columns)
        return reshape_to(ctx, turned, [*size(batch), prod(size(rows)), prod(size(columns))])

    first, second = matrix(a, left, summed), matrix(b, summed, right)
    operator = aten.matmul.default if summed else aten.mul.Tensor
    product = ctx.op(operator, first, second)
    return batch + left + right, reshape_to(ctx, product, size(batch + left + right))


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value]] = {"Einsum": einsum}
