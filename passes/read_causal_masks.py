"""Recognize a constant mask of attention that is the causal triangle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt import graph as g
from graphopt.passes._nodes import aten, bind
from graphopt.passes.base import APPROX, Context, NoteBook, Pass, PassResult
from graphopt.passes.fuse_attention import AS_GOOD_AS_MINUS_INFINITY
from graphopt.passes.rewrite import Editor, Rule, apply_rules


@dataclass(frozen=True)
class ReadCausalMasks(Pass):
    """Recognize a constant mask of attention that is the causal triangle.

    ::

        scaled_dot_product_attention(q, k, v, triangle)

                →   scaled_dot_product_attention(q, k, v, is_causal=True)

    What lies above the diagonal is then not computed. The mask may be one of bools, or added: 0 up
    to the diagonal and above it -inf or a number that acts as such beside any other score.
    """

    name = "read_causal_masks"
    # Sums over fewer weights that are not 0 may be taken in another order.
    effect = APPROX(rtol=1e-5, atol=1e-6)
    after = ("fuse_attention", "fold_constants")

    def run(self, graph: fx.GraphModule, ctx: Context) -> PassResult:
        """Apply the rule once to each attention."""
        notes = NoteBook()
        target = aten.scaled_dot_product_attention.default
        apply_rules(graph, (Rule("read causal mask", (target,), _causal, _without_mask),), notes)
        return notes.result()


def _causal(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    a = bind(node)
    mask = g.constant(gm, a["attn_mask"])
    size = (g.shape(a["query"])[-2], g.shape(a["key"])[-2])
    if mask is None or a["is_causal"] or tuple(mask.shape[-2:]) != size:
        return None
    kept = torch.ones(size, dtype=torch.bool).tril()
    if mask.dtype == torch.bool:
        return node if bool((mask == kept).all()) else None
    attended = torch.where(kept, mask == 0, mask <= AS_GOOD_AS_MINUS_INFINITY)
    return node if bool(attended.all()) else None


def _without_mask(ed: Editor, node: fx.Node) -> fx.Node:
    a = bind(node)
    operands = [a[name] for name in ("query", "key", "value")]
    options = {name: a[name] for name in ("scale", "enable_gqa")}
    return ed.call(node.target, *operands, None, a["dropout_p"], True, **options)  # type: ignore[arg-type]
