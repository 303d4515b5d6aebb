"""ONNX attention and rotary position embeddings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt

import torch

from graphopt.importers.onnx.shape import constant_pad, expand_to, permute_to, reshape_to
from graphopt.importers.onnx.values import (
    Context,
    OnnxNode,
    Refused,
    Value,
    dtype,
    rank,
    shape,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class _Mask:
    """Which keys a query meets.

    Attributes:
        allowed: a boolean tensor of what may be met, or None.
        added: what is added to the scores, or None.
        causal: whether keys that come after a query are left out, besides.
    """

    allowed: Value | None
    added: Value | None
    causal: bool

    def whole(self, ctx: Context) -> Value | None:
        """One mask for `scaled_dot_product_attention`, but for the causal triangle."""
        if self.allowed is None or self.added is None:
            return self.added if self.allowed is None else self.allowed
        outside = torch.full((), -inf, dtype=dtype(self.added))
        return ctx.op(aten.where.self, self.allowed, self.added, outside)


def attention(ctx: Context, node: OnnxNode) -> tuple[Value, ...]:
    """Softmax of scaled scores, times the values; the softmax is computed in float32.

    Returns:
        The result, the keys and the values with the past ones before them, and the scores at the
        stage that `qk_matmul_output_mode` asks for, where anything reads them.
    """
    q, k, v = (node.value(i) for i in range(3))
    whole = rank(q) == 3
    if whole:
        q = _apart(ctx, node, q, "q_num_heads")
        k, v = (_apart(ctx, node, x, "kv_num_heads") for x in (k, v))
    if node.has(4) != node.has(5):
        raise Refused("it has past keys or past values, but not both")
    past = 0
    if node.has(4):
        past = shape(node.value(4))[2]
        k = ctx.op(aten.cat.default, [node.value(4), k], 2)
        v = ctx.op(aten.cat.default, [node.value(5), v], 2)
    mask = _mask(ctx, node, shape(q)[2], shape(k)[2], past)
    scale = node.get_float("scale", 1 / sqrt(shape(q)[3]))
    grouped = shape(q)[1] != shape(k)[1]
    asks = len(node.used) > 3 and node.used[3]
    scores: tuple[Value, ...] = ()
    if asks or node.get_float("softcap", 0.0) > 0:
        times = shape(q)[1] // shape(k)[1]
        result, shown = _in_steps(ctx, node, q, _repeat(ctx, k, times), _repeat(ctx, v, times),
                                  mask, scale)  # fmt: skip
        scores = (shown,)
    else:
        result = ctx.op(
            aten.scaled_dot_product_attention.default, q, k, v, mask.whole(ctx), 0.0, mask.causal,
            scale=scale, enable_gqa=grouped,
        )  # fmt: skip
    return (_together(ctx, result) if whole else result, k, v, *scores)


def _apart(ctx: Context, node: OnnxNode, x: Value, count: str) -> Value:
    """(batch, rows, heads · width) as (batch, heads, rows, width)."""
    heads = node.get_int(count, 0)
    batch, rows, width = shape(x)
    if heads < 1 or width % heads:
        raise Refused(f"{count} = {heads} does not divide its {width} columns")
    apart = reshape_to(ctx, x, [batch, rows, heads, width // heads])
    return permute_to(ctx, apart, (0, 2, 1, 3))


def _together(ctx: Context, x: Value) -> Value:
    """(batch, heads, rows, width) as (batch, rows, heads · width)."""
    batch, heads, rows, width = shape(x)
    turned = permute_to(ctx, x, (0, 2, 1, 3))
    return reshape_to(ctx, turned, [batch, rows, heads * width])


def _repeat(ctx: Context, x: Value, times: int) -> Value:
    """Each head so many times in a row."""
    if times == 1:
        return x
    batch, heads, rows, width = shape(x)
    one = reshape_to(ctx, x, [batch, heads, 1, rows, width])
    more = expand_to(ctx, one, [batch, heads, times, rows, width])
    return reshape_to(ctx, more, [batch, heads * times, rows, width])


def _mask(ctx: Context, node: OnnxNode, queries: int, keys: int, past: int) -> _Mask:
    """All that restricts the keys: the mask, the triangle, the window and the padding."""
    allowed: list[Value] = []
    added: Value | None = None
    given = node.optional(3)
    if given is not None:
        given = _as_wide(ctx, given, keys)
        if dtype(given) == torch.bool:
            allowed.append(given)
        else:
            added = given
    first: Value = torch.full((1, 1, 1, 1), past)
    lengths = node.optional(6)
    columns = torch.arange(keys).reshape(1, 1, 1, keys)
    if lengths is not None:
        count = reshape_to(ctx, lengths, [-1, 1, 1, 1])
        allowed.append(ctx.op(aten.lt.Tensor, columns, count))
        if not past:
            first = ctx.op(aten.sub.Tensor, count, queries)
    # How far each key is behind the query's own place.
    rows = torch.arange(queries).reshape(1, 1, queries, 1)
    behind = ctx.op(aten.sub.Tensor, columns, ctx.op(aten.add.Tensor, rows, first))
    causal = bool(node.get_int("is_causal", 0))
    left, right = (node.get_int(f"{side}_window_size", -1) for side in ("left", "right"))
    simple = causal and not past and lengths is None and given is None and left < 0
    if causal and not simple:
        right = 0
    if right >= 0 and not simple:
        allowed.append(ctx.op(aten.le.Scalar, behind, right))
    if left >= 0:
        allowed.append(ctx.op(aten.ge.Scalar, behind, -left))
    both: Value | None = None
    for one in allowed:
        both = one if both is None else ctx.op(aten.logical_and.default, both, one)
    return _Mask(both, added, simple)


def _as_wide(ctx: Context, mask: Value, keys: int) -> Value:
    """The mask for all keys, those that it says nothing of left out, with two axes at least."""
    if rank(mask) < 2:
        mask = reshape_to(ctx, mask, [1, *shape(mask)] if rank(mask) else [1, 1])
    missing = keys - shape(mask)[-1]
    if missing < 1 or (ctx.opset < 24 and shape(mask)[-1] == 1):
        return mask
    if dtype(mask) == torch.bool:
        beyond = torch.zeros((*shape(mask)[:-1], missing), dtype=torch.bool)
        return ctx.op(aten.cat.default, [mask, beyond], -1)
    return constant_pad(ctx, mask, [*[(0, 0)] * (rank(mask) - 1), (0, missing)], -inf)


def _in_steps(
    ctx: Context, node: OnnxNode, q: Value, k: Value, v: Value, mask: _Mask, scale: float
) -> tuple[Value, Value]:
    """The result and the scores that the node shows, with capped scores if it wants them so."""
    scaled = ctx.op(aten.mul.Tensor, q, scale)
    scores = ctx.op(aten.matmul.default, scaled, permute_to(ctx, k, (0, 1, 3, 2)))
    shown = [scores]
    cap = node.get_float("softcap", 0.0)
    if cap > 0:
        bounded = ctx.op(aten.tanh.default, ctx.op(aten.div.Tensor, scores, cap))
        scores = ctx.op(aten.mul.Tensor, bounded, cap)
    shown.append(scores)
    allowed, added = mask.allowed, mask.added
    if mask.causal:
        allowed = torch.ones(shape(scores)[-2:], dtype=torch.bool).tril()
    if added is not None:
        scores = ctx.op(aten.add.Tensor, scores, added)
    if allowed is not None:
        outside = torch.full((), -inf, dtype=dtype(scores))
        scores = ctx.op(aten.where.self, allowed, scores, outside)
    shown.append(scores)
    parts = ctx.op(aten.softmax.int, scores, -1)
    if added is not None or allowed is not None:
        # A query that meets no key gets nothing.
        nothing = ctx.op(aten.eq.Scalar, ctx.op(aten.amax.default, scores, [-1], True), -inf)
        parts = ctx.op(aten.where.self, nothing, torch.zeros((), dtype=dtype(parts)), parts)
    shown.append(parts)
    result = ctx.op(aten.matmul.default, parts, v)
    return result, shown[node.get_int("qk_matmul_output_mode", 0)]


def rotary_embedding(ctx: Context, node: OnnxNode) -> Value:
    """Pairs of each head's first channels, turned by their place's angles."""
    x, cos, sin = (node.value(i) for i in range(3))
    whole = rank(x) == 3
    if whole:
        x = _apart(ctx, node, x, "num_heads")
    size = shape(x)[3]
    turned = node.get_int("rotary_embedding_dim", 0) or size
    if turned % 2 or turned > size:
        raise Refused(f"rotary_embedding_dim = {turned} for heads of {size} channels")
    places = node.optional(3)

    def angles(cache: Value) -> Value:
        if places is not None:
            cache = ctx.op(aten.embedding.default, cache, places)
        batch, rows, half = shape(cache)
        if half != turned // 2:
            raise Refused(f"its angles are of {half} pairs of channels, not of {turned // 2}")
        return reshape_to(ctx, cache, [batch, 1, rows, half])

    cos, sin = angles(cos), angles(sin)
    part = ctx.op(aten.slice.Tensor, x, 3, 0, turned)
    paired = bool(node.get_int("interleaved", 0))
    if paired:
        pairs = reshape_to(ctx, part, [*shape(x)[:3], turned // 2, 2])
        a, b = (ctx.op(aten.select.int, pairs, 4, i) for i in (0, 1))
    else:
        a, b = (
            ctx.op(aten.slice.Tensor, part, 3, i * turned // 2, (i + 1) * turned // 2)
            for i in (0, 1)
        )

    def products(left: Value, right: Value) -> tuple[Value, Value]:
        return ctx.op(aten.mul.Tensor, left, a), ctx.op(aten.mul.Tensor, right, b)

    parts = [
        ctx.op(aten.sub.Tensor, *products(cos, sin)),
        ctx.op(aten.add.Tensor, *products(sin, cos)),
    ]
    if paired:
        parts = [ctx.op(aten.unsqueeze.default, value, 4) for value in parts]
    result = ctx.op(aten.cat.default, parts, -1)
    if paired:
        result = reshape_to(ctx, result, list(shape(part)))
    if turned < size:
        rest = ctx.op(aten.slice.Tensor, x, 3, turned, size)
        result = ctx.op(aten.cat.default, [result, rest], -1)
    return _together(ctx, result) if whole else result


HANDLERS: dict[str, Callable[[Context, OnnxNode], Value | tuple[Value, ...]]] = {
    "Attention": attention,
    "RotaryEmbedding": rotary_embedding,
}
