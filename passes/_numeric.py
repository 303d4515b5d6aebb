"""Running graphs on sample inputs and comparing what they give, by a pass's effect."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.graph import placeholders, value
from graphopt.passes.base import Context, Effect

Outputs = tuple[torch.Tensor, ...]


def sample_inputs(gm: fx.GraphModule, ctx: Context) -> tuple[tuple[torch.Tensor, ...], ...]:
    """The caller's samples, or one seeded set that fits the placeholders.

    Made-up integers are 0 or 1: small enough to index any embedding of two rows or more.
    """
    if ctx.samples:
        return ctx.samples
    random = torch.Generator().manual_seed(ctx.seed)
    made = []
    for node in placeholders(gm):
        like = value(node)
        if like.dtype.is_floating_point:
            made.append(torch.randn(like.shape, generator=random).to(like.dtype))
        else:
            made.append(torch.randint(0, 2, like.shape, generator=random).to(like.dtype))
    return (tuple(made),)


def evaluate(gm: fx.GraphModule, inputs: Sequence[torch.Tensor]) -> Outputs:
    """Run the graph node by node in PyTorch; needs no recompilation."""
    with torch.no_grad():
        outputs: Any = _Contiguous(gm).run(*inputs)
    # Copies: an output may be a view of an input or of a constant.
    return tuple(output.clone() for output in outputs)


class _Contiguous(fx.Interpreter):
    """Runs every op on contiguous tensors.

    PyTorch picks kernels, and with them the order of sums, by strides. Without this, an op after
    a permute and one after the same permute, folded, would differ in their last bits.
    """

    def run_node(self, n: fx.Node) -> Any:
        """The node's value, in the order of its shape."""
        value = super().run_node(n)
        return value.contiguous() if isinstance(value, torch.Tensor) else value


def difference(before: Outputs, after: Outputs) -> float:
    """The largest `max|after - before| / max|before|` of the outputs; inf if NaN or inf moved."""
    worst = 0.0
    for b, a in zip(before, after, strict=True):
        error, scale = _error(b, a)
        if error:
            worst = max(worst, error / scale if scale else float("inf"))
    return worst


def disagreement(effect: Effect, before: Outputs, after: Outputs) -> str:
    """Empty if `after` is what `effect` allows, else which output is off and by how much."""
    if effect.kind == "lossy":
        return ""
    for index, (b, a) in enumerate(zip(before, after, strict=True)):
        if effect.kind == "exact":
            if not same_bits(b, a):
                error, _ = _error(b, a)
                return f"output {index} is not bit for bit the same: max |error| {error:.3g}"
            continue
        error, scale = _error(b, a)
        allowed = effect.atol + effect.rtol * scale
        if not error <= allowed:
            return f"output {index} is off by {error:.3g}, allowed is {allowed:.3g}"
    return ""


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both have the same shape, dtype and bytes; any NaN counts as any other NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.is_floating_point:
        nan = a.isnan()
        if not torch.equal(nan, b.isnan()):
            return False
        a, b = a.masked_fill(nan, 0), b.masked_fill(nan, 0)
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _error(before: torch.Tensor, after: torch.Tensor) -> tuple[float, float]:
    """`max|after - before|` and `max|before|` over finite values; the rest must agree."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return float("inf"), 0.0
    if not before.numel():
        return 0.0, 0.0
    b, a = before.to(torch.float64), after.to(torch.float64)
    finite = b.isfinite()
    if not torch.equal(
        b.masked_fill(finite, 0).nan_to_num(), a.masked_fill(finite, 0).nan_to_num()
    ):
        return float("inf"), 0.0
    if not torch.equal(b.isnan(), a.isnan()):
        return float("inf"), 0.0
    b, a = b.masked_fill(~finite, 0), a.masked_fill(~finite, 0)
    return float((a - b).abs().max()), float(b.abs().max())
