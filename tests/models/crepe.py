"""CREPE "tiny": a pitch estimator on 1,024 samples of 16 kHz audio, parameters as published.

Kim et al., "CREPE: A Convolutional Representation for Pitch Estimation",
https://arxiv.org/abs/1802.06182
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

CHANNELS = (1, 128, 16, 16, 16, 32, 64)
PITCH_BINS = 360


class CrepeTiny(nn.Module):
    """(N, 1024) audio frames, zero mean and unit variance, to (N, 360) pitch salience."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(1, 7):
            kernel, stride = (512, 4) if i == 1 else (64, 1)
            conv = nn.Conv2d(CHANNELS[i - 1], CHANNELS[i], (kernel, 1), (stride, 1))
            self.add_module(f"conv{i}", conv)
            self.add_module(f"conv{i}_BN", nn.BatchNorm2d(CHANNELS[i], eps=1e-3))
        self.classifier = nn.Linear(256, PITCH_BINS)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            top, bottom = (254, 254) if i == 1 else (31, 32)
            x = functional.pad(x, (0, 0, top, bottom))
            x = functional.relu(self.get_submodule(f"conv{i}")(x))
            x = self.get_submodule(f"conv{i}_BN")(x)
            x = functional.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))
