"""Writes the nine ONNX files that the benchmark compares on; runs in the peers' own environment.

    python bench/peers/export.py FOLDER

Random weights (seed 0), fixed shapes, batch 1, float32.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

OPSET = 18
TOKENS = 128


@dataclass(frozen=True)
class Export:
    """One model: how to make it, and what its inputs look like.

    Args:
        make: a function to the module; weights are drawn from torch's global generator.
        image: it takes one picture, 1×3×224×224; otherwise 128 tokens and their mask.
    """

    make: Callable[[], nn.Module]
    image: bool = True


class Encoder(nn.Module):
    """A BERT that returns its last hidden state and nothing else.

    The mask becomes numbers to add to the scores, and attention is written out, as it always was
    in exported BERTs; from today's defaults come `GatherND` and `IsNaN`, which not everybody reads.
    """

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(
            BertConfig(attn_implementation="eager", **sizes), add_pooling_layer=False
        )

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hide = (1 - attention_mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        result = self.bert(
            input_ids=input_ids,
            attention_mask=hide,
            token_type_ids=torch.zeros_like(input_ids),
            position_ids=torch.arange(TOKENS)[None],
        )
        hidden: torch.Tensor = result.last_hidden_state
        return hidden


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model


def vit_tiny() -> nn.Module:
    import timm

    model: nn.Module = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    return model


EXPORTS = {
    "resnet18": Export(lambda: torchvision_model("resnet18")),
    "resnet50": Export(lambda: torchvision_model("resnet50")),
    "mobilenet_v2": Export(lambda: torchvision_model("mobilenet_v2")),
    "mobilenet_v3_large": Export(lambda: torchvision_model("mobilenet_v3_large")),
    "efficientnet_b0": Export(lambda: torchvision_model("efficientnet_b0")),
    "squeezenet1_1": Export(lambda: torchvision_model("squeezenet1_1")),
    "vit_tiny": Export(vit_tiny),
    "minilm_l6": Export(
        lambda: Encoder(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        ),
        image=False,
    ),
    "bert_base": Export(lambda: Encoder(), image=False),
}


def randomize_norms(model: nn.Module, example: torch.Tensor) -> None:
    """Give each batch normalization the statistics of its input, a little off, and a random scale.

    Fresh ones (mean 0, variance 1) do nothing, and activations of a deep net then fade or explode:
    denormal numbers are slow, and infinite ones prove nothing.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, -0.3, 0.3)
        norm.momentum = None  # The running statistics become those of the one batch.
        norm.train()
    with torch.no_grad():
        model(example)
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean += 0.1 * norm.running_var.sqrt() * torch.randn(norm.num_features)
        norm.running_var *= torch.empty(norm.num_features).uniform_(0.8, 1.25)
        norm.eval()


def example_inputs(export: Export, batch: int = 1) -> dict[str, torch.Tensor]:
    """What the model is traced with; by input name, in order."""
    if export.image:
        return {"image": torch.randn(batch, 3, 224, 224)}
    return {
        "input_ids": torch.randint(1000, 30000, (batch, TOKENS)),
        "attention_mask": torch.ones(batch, TOKENS, dtype=torch.int64),
    }


def build(name: str) -> nn.Module:
    """The module in eval mode; the same weights every time."""
    export = EXPORTS[name]
    torch.manual_seed(0)
    model = export.make().eval()
    if export.image:
        randomize_norms(model, example_inputs(export, batch=4)["image"])
    return model


def write(name: str, path: Path) -> None:
    """Write the model in one step, after a check that its output is sane."""
    model = build(name)
    inputs = example_inputs(EXPORTS[name])
    with torch.inference_mode():
        output = model(*inputs.values())
    if not (output.isfinite().all() and 1e-3 < output.abs().max() < 1e3):
        raise ValueError(f"{name}: outputs up to {output.abs().max():.1e}: weights degenerate")
    partial = path.with_suffix(".partial")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            tuple(inputs.values()),
            str(partial),
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=["output"],
            verbose=False,
        )
    os.replace(partial, path)
    print(f"{name}: outputs up to {output.abs().max():.2g}, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in EXPORTS:
        write(name, folder / f"{name}.onnx")


if __name__ == "__main__":
    main()
