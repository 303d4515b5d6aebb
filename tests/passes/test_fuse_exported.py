"""The fuse passes on models as PyTorch exports them to ONNX, on PyTorch itself, and on the zoo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from pass_graphs import evaluate, ops
from torch import fx, nn
from torch.nn import functional

from graphopt.importers import import_model
from graphopt.passes import Context, default_pipeline, run_passes
from tests.models import zoo

ATTENTION = "scaled_dot_product_attention"


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Causal(nn.Module):
    """GPT-2's way: a triangular mask, selected with where; GELU with tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mix = nn.Linear(16, 48)
        self.register_buffer("mask", torch.tril(torch.ones(1, 1, 9, 9)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.mix(self.norm(x)).split(16, 2)
        q, k, v = (part.view(2, 7, 4, 4).transpose(1, 2) for part in parts)
        scores = q @ k.transpose(-2, -1) * 0.5
        scores = scores.masked_fill(self.mask[:, :, :7, :7] == 0, float("-inf"))
        out = torch.softmax(scores, -1) @ v
        return functional.gelu(out.transpose(1, 2).reshape(2, 7, 16), approximate="tanh")


class Whole(nn.Module):
    """PyTorch's own function, with the causal flag."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.mix(x).view(2, 7, 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(2, 7, 16)


class OnPixels(nn.Module):
    """Attention of convolutional detectors: channels first, the second product transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(16, 32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).reshape(2, 16, 7, 1)
        q, k, v = self.mix(x).view(2, 2, 16, 7).split([4, 4, 8], dim=2)
        shares = (q.transpose(-2, -1) @ k * 0.5).softmax(-1)
        return v @ shares.transpose(-2, -1)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, activation="gelu", batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "multihead": (Multihead, {ATTENTION: 1}),
    "causal": (Causal, {ATTENTION: 1, "layer_norm": 1, "gelu": 1}),
    "whole": (Whole, {ATTENTION: 1}),
    "on pixels": (OnPixels, {ATTENTION: 1}),
    "encoder": (Encoder, {ATTENTION: 1, "layer_norm": 2, "gelu": 1}),
}
REST = {"matmul", "softmax", "mean", "sqrt", "erf", "tanh", "isnan"}


def imported(model: nn.Module, x: torch.Tensor, opset: int | None, folder: Path) -> fx.GraphModule:
    if opset is None:
        return import_model(model, (x,))
    path = folder / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, opset_version=opset)
    return import_model(path)


# Layer norm is an ONNX operator from opset 17 on, GELU from 20, attention from 23.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [14, 17, None])
@pytest.mark.parametrize("name", MODELS)
def test_exported(name: str, opset: int | None, tmp_path: Path) -> None:
    build, expected = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(2, 7, 16)
    gm = imported(model, x, opset, tmp_path)
    run_passes(gm, default_pipeline(), Context(verify=2, samples=((x,),)))
    counts = Counter(ops(gm))
    assert {op: counts[op] for op in expected} == expected
    assert not REST & set(counts)
    with torch.no_grad():
        torch.testing.assert_close(evaluate(gm, (x,))[0], model(x), rtol=1e-5, atol=1e-5)


def test_a_text_recognizer() -> None:
    """PP-OCR's, exported by Paddle: attention scaled at the queries, all of it written out."""
    entry = zoo.MODELS["ppocr_rec"]
    gm = import_model(entry.model(), entry.inputs())
    before = deepcopy(gm)
    inputs = tuple(torch.from_numpy(array) for array in entry.inputs(seed=1).values())
    run_passes(gm, default_pipeline(), Context(samples=(inputs,), verify=2))
    counts = Counter(ops(gm))
    assert (counts["layer_norm"], counts[ATTENTION], counts["softmax"]) == (5, 2, 1)
    # 40 layers deep, some folded, all summing in another order.
    for old, new in zip(evaluate(before, inputs), evaluate(gm, inputs), strict=True):
        assert float((new - old).abs().max()) <= 2e-5 * float(old.abs().max())
