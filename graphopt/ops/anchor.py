"""Operators with kernel generators of their own (see `backends/kernels`)."""

from __future__ import annotations

import torch

from graphopt.ops.opdef import Call, Kind, OpDef

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


def _attention(call: Call) -> str | None:
    if call["dropout_p"]:
        return "dropout inside attention; call model.eval()"
    return _float_only(call)


ANCHOR: tuple[OpDef, ...] = (
    OpDef("convolution", (aten.convolution.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_convolution),
    OpDef("linear", (aten.linear.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_linear),
    OpDef("matmul", (aten.matmul.default, aten.bmm.default, aten.mm.default), Kind.ANCHOR,
          operands=("self", "other"), check=_float_only),
    OpDef("softmax", (aten.softmax.int, aten._softmax.default), Kind.ANCHOR, check=_float_only),
    OpDef("log_softmax", (aten.log_softmax.int, aten._log_softmax.default), Kind.ANCHOR,
          check=_float_only),
    OpDef("layer_norm", (aten.layer_norm.default,), Kind.ANCHOR,
          operands=("input", "weight", "bias"), check=_float_only),
    OpDef("attention", (aten.scaled_dot_product_attention.default,), Kind.ANCHOR,
          operands=("query", "key", "value", "attn_mask"), check=_attention),
)  # fmt: skip
