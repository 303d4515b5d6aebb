"""read_causal_masks: which constants are the causal triangle."""

from __future__ import annotations

import pytest
import torch
from pass_graphs import Build, aten, changes, run
from torch import fx, nn

from graphopt.importers import import_model
from graphopt.passes import default_pipeline, run_passes
from graphopt.passes.read_causal_masks import ReadCausalMasks

attention = aten.scaled_dot_product_attention.default
KEPT = torch.ones(5, 7, dtype=torch.bool).tril()


def added(number: float) -> torch.Tensor:
    return torch.where(KEPT, 0.0, number)


def read(mask: torch.Tensor) -> fx.GraphModule:
    """The graph of attention with this constant mask; five queries, seven keys."""
    b = Build()
    q, k, v = b.input(2, 4, 5, 6), b.input(2, 2, 7, 6), b.input(2, 2, 7, 3)
    y = b.call(attention, q, k, v, b.const(mask), 0.0, False, scale=0.3, enable_gqa=True)
    return b.done(y)


@pytest.mark.parametrize(
    "mask",
    [KEPT, added(-torch.inf), added(-1e9), added(torch.finfo(torch.float32).min),
     KEPT.expand(1, 4, 5, 7), added(-torch.inf).expand(2, 1, 5, 7)],
)  # fmt: skip
def test_triangles(mask: torch.Tensor) -> None:
    gm = read(mask)
    assert changes(run(gm, ReadCausalMasks())) == {"read causal mask": 1}
    (node,) = (n for n in gm.graph.nodes if n.target is attention)
    assert node.args[3:] == (None, 0.0, True)
    assert node.kwargs == {"scale": 0.3, "enable_gqa": True}


def _with(place: tuple[int, int], number: float) -> torch.Tensor:
    mask = added(-torch.inf)
    mask[place] = number
    return mask


@pytest.mark.parametrize(
    "mask",
    [~KEPT, torch.ones_like(KEPT), KEPT.roll(1, 1), added(-1e4), added(torch.nan), KEPT[:1],
     _with((4, 4), 0.5), _with((4, 4), -torch.inf), _with((0, 6), 0.0)],
)  # fmt: skip
def test_others_stay(mask: torch.Tensor) -> None:
    assert changes(run(read(mask), ReadCausalMasks())) == {}


class Decoder(nn.Module):
    """Attention as GPT-2 is exported: a buffer of bools, the lowest float above the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ x.transpose(-1, -2) / 2
        lowest = torch.finfo(torch.float32).min
        kept = self.bias[:, :, : x.shape[-2], : x.shape[-2]]
        return torch.softmax(torch.where(kept, scores, lowest), -1) @ x


def test_written_out_in_a_model() -> None:
    gm = import_model(Decoder().eval(), (torch.randn(1, 2, 6, 4),))
    run_passes(gm, default_pipeline())
    (node,) = (n for n in gm.graph.nodes if n.target is attention)
    assert node.args[3:6] == (None, 0.0, True)
