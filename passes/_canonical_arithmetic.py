"""Canonical forms of elementwise, reduction and matrix ops; part of the pass `canonicalize`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from graphopt.graph import constant, shape, value
from graphopt.passes._canonical import Handler, Outcome
from graphopt.passes._canonical_shapes import wrap
from graphopt.passes._nodes import aten, calls, is_float, rank
from graphopt.passes.rewrite import Editor, Refusal

Arguments = dict[str, Any]
Number = bool | int | float


def _scaled(ed: Editor, x: Any, factor: Number) -> Any:
    """`x * factor`, left out for 1."""
    if factor == 1:
        return x
    return ed.call(aten.mul.Tensor, x, factor) if isinstance(x, fx.Node) else x * factor


def _add_or_sub(op: Any, opposite: Any) -> Handler:
    """Scalar overloads and `alpha` → the plain .Tensor form."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        x, y, alpha = a["self"], a["other"], a["alpha"]
        if node.target is op and alpha == 1:
            return None
        if alpha == -1 and isinstance(y, fx.Node):
            return ed.call(opposite, x, y)
        return ed.call(op, x, _scaled(ed, y, alpha))

    return handle


def _rsub(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    x, y = _scaled(ed, a["self"], a["alpha"]), a["other"]
    if isinstance(y, fx.Node):
        return ed.call(aten.sub.Tensor, y, x)
    return ed.call(aten.add.Tensor, ed.call(aten.neg.default, x), y)


def _renamed(op: Any) -> Handler:
    """Another name or overload of `op` with the same arguments in the same order."""

    def handle(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
        return ed.call(op, *a.values())

    return handle


def _div_mode(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    if a["rounding_mode"] is not None:
        return Refusal(f"division rounding to {a['rounding_mode']}")
    return ed.call(aten.div.Tensor, a["self"], a["other"])


def _square(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    return ed.call(aten.mul.Tensor, a["self"], a["self"])


def _power(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    """pow by a constant of one element → pow by a number, for which PyTorch has short cuts."""
    exponent = constant(ed.gm, a["exponent"])
    if exponent is None or exponent.numel() != 1 or exponent.ndim > rank(a["self"]):
        return None
    return ed.call(aten.pow.Tensor_Scalar, a["self"], exponent.item())


def _addc(op: Any) -> Handler:
    """addcmul, addcdiv → mul or div, then add."""

    def handle(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
        inner = ed.call(op, a["tensor1"], a["tensor2"])
        return ed.call(aten.add.Tensor, a["self"], _scaled(ed, inner, a["value"]))

    return handle


def _relu6(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    return ed.call(aten.hardtanh.default, a["self"], 0.0, 6.0)


def _clamp_one(side: str) -> Handler:
    def handle(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
        return ed.call(aten.clamp.default, a["self"], a.get("min"), a.get("max"))

    assert side in ("min", "max")
    return handle


def _clamp_tensor(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    x = a["self"]
    for op, bound in ((aten.maximum.default, a.get("min")), (aten.minimum.default, a.get("max"))):
        if bound is not None:
            x = ed.call(op, x, bound)
    return x  # type: ignore[no-any-return]


def _logical(op: Any) -> Handler:
    """bitwise ops on bool tensors → logical ops."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        if any(isinstance(x, fx.Node) and value(x).dtype != torch.bool for x in a.values()):
            return Refusal("bitwise arithmetic on integers")
        return ed.call(op, *a.values())

    return handle


def _dims(node: fx.Node, a: Arguments) -> list[int]:
    dims = rank(a["self"])
    named = a.get("dim")
    listed = [named] if isinstance(named, int) else list(named or range(dims))
    return sorted(wrap(d, dims) for d in listed)


def _reduction(op: Any) -> Handler:
    """All spellings of a reduction → dims listed and counted from the front."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        x, dims, keep = a["self"], _dims(node, a), a.get("keepdim", False)
        dtype = a.get("dtype")
        if not dims:
            return Refusal("reduction of a scalar")
        if dtype is not None and dtype != value(x).dtype:
            x = ed.call(aten._to_copy.default, x, dtype=dtype)
        elif node.target is op and dtype is None and a["dim"] == dims:
            return None
        return ed.call(op, x, dims, keep)

    return handle


def _extreme_with_indices(op: Any) -> Handler:
    """max.dim, min.dim + getitem 0 → amax, amin."""

    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        return [ed.call(op, a["self"], _dims(node, a), a["keepdim"]), None]

    return handle


def _spread(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """var, std, var_mean, std_mean → means of the differences from the mean, squared."""
    x, dims, keep = a["self"], _dims(node, a), a["keepdim"]
    count = math.prod(shape(x)[dim] for dim in dims)
    free = count - (1 if a["correction"] is None else a["correction"])
    if free <= 0 or not dims or not is_float(x):
        return Refusal(f"the variance of {count} values with correction {a['correction']}")
    mean = ed.call(aten.mean.dim, x, dims, True)
    apart = ed.call(aten.sub.Tensor, x, mean)
    spread = ed.call(aten.mean.dim, ed.call(aten.mul.Tensor, apart, apart), dims, keep)
    spread = _scaled(ed, spread, count / free)
    name = str(node.target)
    if "std" in name:
        spread = ed.call(aten.sqrt.default, spread)
    if "mean" not in name:
        return spread
    return [spread, mean if keep else ed.call(aten.mean.dim, x, dims, False)]


def _softmax(op: Any) -> Handler:
    def handle(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
        if a.get("half_to_float"):
            return Refusal("softmax from half to float")
        x, dim, dtype = a["self"], wrap(a["dim"], max(1, rank(a["self"]))), a.get("dtype")
        if dtype is not None and dtype != value(x).dtype:
            x = ed.call(aten._to_copy.default, x, dtype=dtype)
        elif node.target is op and dtype is None and dim == a["dim"]:
            return None
        return ed.call(op, x, dim)

    return handle


def _product(ed: Editor, _node: fx.Node, a: Arguments) -> Outcome:
    """mm, bmm, mv, dot → matmul."""
    x, y = a.values()
    return ed.call(aten.matmul.default, x, y)


def _add_product(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    """addmm, baddbmm, addmv → linear where the matrix is a transposed one, else matmul + add."""
    bias, x, y = (value for name, value in a.items() if name not in ("alpha", "beta"))
    beta, alpha = a["beta"], a["alpha"]
    is_linear = (
        (alpha, beta) == (1, 1)
        and calls(y, aten.permute.default)
        and list(y.args[1]) == [1, 0]
        and is_float(x)
        and shape(bias) == shape(node)[1:]
        and len(shape(node)) == 2
    )
    if is_linear:
        return ed.call(aten.linear.default, x, y.args[0], bias)
    product = _scaled(ed, ed.call(aten.matmul.default, x, y), alpha)
    if beta == 0:
        return product  # type: ignore[no-any-return]
    return ed.call(aten.add.Tensor, product, _scaled(ed, bias, beta))


def _attention(ed: Editor, node: fx.Node, a: Arguments) -> Outcome:
    if a["dropout_p"]:
        return Refusal("dropout in training mode")
    return [
        ed.call(
            aten.scaled_dot_product_attention.default,
            a["query"],
            a["key"],
            a["value"],
            a["attn_mask"],
            0.0,
            a["is_causal"],
            scale=a["scale"],
        ),
        None,
    ]


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(
        [aten.add.Tensor, aten.add.Scalar], _add_or_sub(aten.add.Tensor, aten.sub.Tensor)
    ),
    **dict.fromkeys(
        [aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar],
        _add_or_sub(aten.sub.Tensor, aten.add.Tensor),
    ),
    **dict.fromkeys([aten.rsub.Scalar, aten.rsub.Tensor], _rsub),
    **dict.fromkeys(
        [aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar], _renamed(aten.mul.Tensor)
    ),
    **dict.fromkeys(
        [
            aten.div.Scalar,
            aten.divide.Tensor,
            aten.divide.Scalar,
            aten.true_divide.Tensor,
            aten.true_divide.Scalar,
        ],
        _renamed(aten.div.Tensor),
    ),
    aten.div.Tensor_mode: _div_mode,
    aten.div.Scalar_mode: _div_mode,
    aten.pow.Tensor_Tensor: _power,
    aten.square.default: _square,
    aten.addcmul.default: _addc(aten.mul.Tensor),
    aten.addcdiv.default: _addc(aten.div.Tensor),
    aten.negative.default: _renamed(aten.neg.default),
    aten.absolute.default: _renamed(aten.abs.default),
    aten.special_expit.default: _renamed(aten.sigmoid.default),
    aten.special_erf.default: _renamed(aten.erf.default),
    aten.relu6.default: _relu6,
    aten.clamp_min.default: _clamp_one("min"),
    aten.clamp_max.default: _clamp_one("max"),
    aten.clip.default: _renamed(aten.clamp.default),
    **dict.fromkeys(
        [aten.clamp.Tensor, aten.clip.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor],
        _clamp_tensor,
    ),
    aten.max.other: _renamed(aten.maximum.default),
    aten.min.other: _renamed(aten.minimum.default),
    aten.bitwise_not.default: _logical(aten.logical_not.default),
    aten.bitwise_and.Tensor: _logical(aten.logical_and.default),
    aten.bitwise_or.Tensor: _logical(aten.logical_or.default),
    aten.bitwise_xor.Tensor: _logical(aten.logical_xor.default),
    aten.__lshift__.Scalar: _renamed(aten.bitwise_left_shift.Tensor_Scalar),
    aten.__lshift__.Tensor: _renamed(aten.bitwise_left_shift.Tensor),
    aten.__rshift__.Scalar: _renamed(aten.bitwise_right_shift.Tensor_Scalar),
    aten.__rshift__.Tensor: _renamed(aten.bitwise_right_shift.Tensor),
    **dict.fromkeys([aten.mean.default, aten.mean.dim], _reduction(aten.mean.dim)),
    **dict.fromkeys([aten.sum.default, aten.sum.dim_IntList], _reduction(aten.sum.dim_IntList)),
    **dict.fromkeys([aten.max.default, aten.amax.default], _reduction(aten.amax.default)),
    **dict.fromkeys([aten.min.default, aten.amin.default], _reduction(aten.amin.default)),
    aten.max.dim: _extreme_with_indices(aten.amax.default),
    aten.min.dim: _extreme_with_indices(aten.amin.default),
    **dict.fromkeys(
        [
            aten.var.correction,
            aten.std.correction,
            aten.var_mean.correction,
            aten.std_mean.correction,
        ],
        _spread,
    ),
    **dict.fromkeys([aten.softmax.int, aten._softmax.default], _softmax(aten.softmax.int)),
    **dict.fromkeys(
        [aten.log_softmax.int, aten._log_softmax.default], _softmax(aten.log_softmax.int)
    ),
    **dict.fromkeys(
        [aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default], _product
    ),
    **dict.fromkeys([aten.addmm.default, aten.baddbmm.default, aten.addmv.default], _add_product),
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
}
