"""Operators with kernel generators of their own (see `backends/kernels`)."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from graphopt.ops.opdef import Call, Kind, OpDef, Sample

aten = torch.ops.aten


def _float_only(call: Call) -> str | None:
    return None if call.dtype == torch.float32 else f"{call.dtype} is not supported, only float32"


def _convolution(call: Call) -> str | None:
    rank = len(call.shape_of("input")) - 2
    if rank not in (1, 2, 3):
        return f"{rank} spatial dimensions; 1 to 3 are supported"
    for name in ("weight", "bias"):
        if call[name] is not None and call[name].op != "get_attr":
            return f"its {name} is computed at run time, not a constant"
    return _float_only(call)


def _linear(call: Call) -> str | None:
    if call["weight"].op != "get_attr":
        return "its weight is computed at run time, not a constant"
    return _float_only(call)


def _scan(call: Call) -> str | None:
    wide = call.dtype in (torch.float32, torch.int32, torch.int64)
    return None if wide else f"totals in {call.dtype} are not supported"


def _grid_sample(call: Call) -> str | None:
    if call["interpolation_mode"] not in (0, 1):
        return "cubic interpolation; bilinear and nearest are supported"
    return _float_only(call)


def _attention(call: Call) -> str | None:
    if call["dropout_p"]:
        return "dropout inside attention; call model.eval()"
    return _float_only(call)


def _random(*shapes: tuple[int, ...], constants: tuple[int, ...] = (), ulp: float = 8,
            rest: tuple[Any, ...] = (), **kwargs: Any) -> Sample:  # fmt: skip
    """Normal values in these shapes, then other arguments."""
    return Sample(
        lambda g: (*(torch.randn(shape, generator=g) for shape in shapes), *rest),
        kwargs, ulp, constants,
    )  # fmt: skip


def _convolved(
    shape: tuple[int, ...], out: int, kernel: tuple[int, ...], stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1, transposed: bool = False, bias: bool = True,
) -> Sample:  # fmt: skip
    rank = len(kernel)
    io = (shape[1], out // groups) if transposed else (out, shape[1] // groups)

    def make(g: torch.Generator) -> tuple[Any, ...]:
        weight = torch.randn(*io, *kernel, generator=g)
        return (
            torch.randn(shape, generator=g), weight,
            torch.randn(out, generator=g) if bias else None,
            [stride] * rank, [padding] * rank, [dilation] * rank, transposed, [0] * rank, groups,
        )  # fmt: skip

    return Sample(make, ulp=16, constants=(1, 2))


def _attended(q: tuple[int, ...], k: tuple[int, ...], mask: Any = None, **kwargs: Any) -> Sample:
    def make(g: torch.Generator) -> tuple[Any, ...]:
        given = None
        if mask is not None:
            given = torch.randn(*mask[1:], generator=g)
            given = given > -0.5 if mask[0] == "bool" else given
        return (*(torch.randn(shape, generator=g) for shape in (q, k, k)), given)

    return Sample(make, kwargs, ulp=16)


_SOFTMAX = tuple(
    Sample(lambda g, s=shape, d=dim: (torch.randn(s, generator=g) * 3, d))  # type: ignore[misc]
    for shape, dim in (
        *((((3, n), -1)) for n in (1, 7, 8, 9, 31)),
        *(((2, 10, 5, 7), dim) for dim in (0, 1, -2, 3)),
        ((4,), 0), ((), 0), ((3, 5, 1), 1),
    )
)  # fmt: skip

_RESIZED = (
    *(((2, 10, 5, 7), (size, corners, None)) for size in ([10, 14], [3, 11], [1, 1], [5, 7])
      for corners in (False, True)),
    *(((2, 10, 5, 7), (None, False, factors)) for factors in ([2.0, 3.0], [1.7, 0.6])),
    ((2, 10, 5, 7), (None, True, [1.7, 2.0])),
    *(((2, 3, 11), rest) for rest in (([25], False, None), ([25], True, None),
                                      (None, False, [2.6]))),
    ((2, 10, 5, 7), (None, False, [2.0, 1.1])),
)  # fmt: skip

_SCANNED = (
    *(_random((2, 10, 5), rest=(dim,)) for dim in (0, 1, -1)),
    _random((9,), rest=(0,)),
    _random((3, 5, 1), rest=(1,)),
    _random((), rest=(0,)),
    Sample(lambda g: (torch.randint(-9, 9, (3, 4), generator=g, dtype=torch.int32), 1)),
    Sample(lambda g: (torch.randn(3, 4, generator=g) > 0, 1)),
)

ANCHOR: tuple[OpDef, ...] = (
    OpDef("convolution", (aten.convolution.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_convolution, samples=(
              _convolved((2, 10, 9, 7), 11, (3, 3), 2, 1), _convolved((1, 6, 8), 4, (3,), groups=2),
              _convolved((2, 10, 9, 7), 10, (3, 3), 1, 1, groups=10),
              _convolved((1, 3, 9, 7), 5, (1, 1), bias=False),
              _convolved((1, 3, 9, 7), 5, (3, 3), dilation=2),
              _convolved((1, 4, 5, 6), 6, (3, 3), 2, 1, transposed=True),
              _convolved((1, 2, 4, 5, 6), 3, (2, 2, 2), padding=1),
          )),
    OpDef("linear", (aten.linear.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_linear, samples=tuple(
              _random(shape, (n, shape[-1]), *bias, constants=(1, 2))
              for shape, n in (((3, 10), 8), ((2, 5, 7), 9), ((1, 1), 1), ((9,), 5),
                               ((2, 3, 2, 8), 17))
              for bias in ((), ((n,),))
          )),
    OpDef("matmul", (aten.matmul.default,), Kind.ANCHOR, operands=("self", "other"),
          check=_float_only, samples=(
              _random((3, 5), (5, 9)), _random((2, 3, 5), (2, 5, 9)),
              _random((4, 1, 3, 5), (2, 5, 9)), _random((5,), (5, 9)),
              _random((3, 5), (5,)), _random((5,), (5,)), _random((5,), (2, 5, 3)),
              _random((2, 3, 5), (5,)), _random((1, 1), (1, 1)),
              _random((2, 3, 5), (5, 9), constants=(1,)), _random((5,), (5, 9), constants=(1,)),
              _random((3, 5), (2, 5, 9), constants=(0,)),
          )),
    OpDef("matmul", (aten.bmm.default, aten.mm.default), Kind.ANCHOR, operands=("self", "mat2"),
          check=_float_only, samples=(
              _random((2, 3, 5), (2, 5, 9)), _random((3, 5), (5, 9)),
              _random((3, 5), (5, 9), constants=(1,)),
          )),
    OpDef("softmax", (aten.softmax.int, aten._softmax.default), Kind.ANCHOR, check=_float_only,
          samples=_SOFTMAX),
    OpDef("log_softmax", (aten.log_softmax.int, aten._log_softmax.default), Kind.ANCHOR,
          check=_float_only, samples=_SOFTMAX),
    OpDef("layer_norm", (aten.layer_norm.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_float_only, samples=(
              _random((3, 9), rest=([9],)), _random((2, 10, 5, 7), rest=([5, 7], None, None, 0.1)),
              Sample(lambda g: (torch.randn(2, 3, 31, generator=g) + 5, [31],
                                torch.randn(31, generator=g), torch.randn(31, generator=g)),
                     ulp=8, constants=(2, 3)),
          )),
    OpDef("attention", (aten.scaled_dot_product_attention.default,), Kind.ANCHOR,
          operands=("query", "key", "value", "attn_mask"), check=_attention, samples=(
              _attended((2, 3, 5, 7), (2, 3, 5, 7)), _attended((1, 2, 5, 8), (1, 2, 9, 8)),
              _attended((2, 2, 5, 8), (2, 2, 9, 8), ("bool", 2, 1, 1, 9)),
              _attended((2, 2, 5, 8), (2, 2, 9, 8), ("float", 5, 9)),
              _attended((1, 2, 9, 3), (1, 2, 9, 3), is_causal=True),
              _attended((1, 4, 5, 8), (1, 2, 5, 8), enable_gqa=True, scale=0.3),
              _attended((3, 5, 7), (3, 5, 7)),
          )),
    OpDef("cumsum", (aten.cumsum.default,), Kind.ANCHOR, check=_scan, samples=_SCANNED),
    OpDef("cumprod", (aten.cumprod.default,), Kind.ANCHOR, check=_scan, samples=_SCANNED),
    OpDef("grid_sample", (aten.grid_sampler_2d.default,), Kind.ANCHOR, operands=("input", "grid"),
          check=_grid_sample, samples=tuple(
              Sample(lambda g, s=shape, z=size, r=rest: (  # type: ignore[misc]
                  torch.randn(s, generator=g), torch.rand(s[0], *z, 2, generator=g) * 4 - 2, *r
              ), ulp=64)
              for shape, size in (((2, 3, 5, 7), (4, 6)), ((1, 1, 1, 9), (13, 11)))
              for rest in product((0, 1), (0, 1, 2), (False, True))
          )),
    OpDef("upsample_linear", (aten.upsample_bilinear2d.vec, aten.upsample_linear1d.vec),
          Kind.ANCHOR, operands=("input",), check=_float_only, samples=tuple(
              _random(shape, rest=rest, ulp=4) for shape, rest in _RESIZED
          )),
)  # fmt: skip
