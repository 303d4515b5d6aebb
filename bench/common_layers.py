"""The distinct layers of nine common networks, in the notation of `layers.py`.

As they come out of graphopt's passes for batch 1, 224×224 pixels or 128 tokens; each under the
first network that has it.
"""

from __future__ import annotations

_TEXT = """
# resnet18
conv 3x224x224 64 k7 s2 p3
conv 64x56x56 64 k3 p1
conv 64x56x56 128 k3 s2 p1
conv 64x56x56 128 k1 s2
conv 128x28x28 128 k3 p1
conv 128x28x28 256 k3 s2 p1
conv 128x28x28 256 k1 s2
conv 256x14x14 256 k3 p1
conv 256x14x14 512 k3 s2 p1
conv 256x14x14 512 k1 s2
conv 512x7x7 512 k3 p1
linear 1x512 1000
# resnet50
conv 64x56x56 64 k1
conv 64x56x56 256 k1
conv 256x56x56 64 k1
conv 256x56x56 128 k1
conv 256x56x56 512 k1 s2
conv 128x56x56 128 k3 s2 p1
conv 128x28x28 512 k1
conv 512x28x28 128 k1
conv 512x28x28 256 k1
conv 512x28x28 1024 k1 s2
conv 256x28x28 256 k3 s2 p1
conv 256x14x14 1024 k1
conv 1024x14x14 256 k1
conv 1024x14x14 512 k1
conv 1024x14x14 2048 k1 s2
conv 512x14x14 512 k3 s2 p1
conv 512x7x7 2048 k1
conv 2048x7x7 512 k1
linear 1x2048 1000
# mobilenet_v2
conv 3x224x224 32 k3 s2 p1
conv 32x112x112 32 k3 p1 g32
conv 32x112x112 16 k1
conv 16x112x112 96 k1
conv 96x112x112 96 k3 s2 p1 g96
conv 96x56x56 24 k1
conv 24x56x56 144 k1
conv 144x56x56 144 k3 p1 g144
conv 144x56x56 24 k1
conv 144x56x56 144 k3 s2 p1 g144
conv 144x28x28 32 k1
conv 32x28x28 192 k1
conv 192x28x28 192 k3 p1 g192
conv 192x28x28 32 k1
conv 192x28x28 192 k3 s2 p1 g192
conv 192x14x14 64 k1
conv 64x14x14 384 k1
conv 384x14x14 384 k3 p1 g384
conv 384x14x14 64 k1
conv 384x14x14 96 k1
conv 96x14x14 576 k1
conv 576x14x14 576 k3 p1 g576
conv 576x14x14 96 k1
conv 576x14x14 576 k3 s2 p1 g576
conv 576x7x7 160 k1
conv 160x7x7 960 k1
conv 960x7x7 960 k3 p1 g960
conv 960x7x7 160 k1
conv 960x7x7 320 k1
conv 320x7x7 1280 k1
linear 1x1280 1000
# mobilenet_v3_large
conv 3x224x224 16 k3 s2 p1
conv 16x112x112 16 k3 p1 g16
conv 16x112x112 16 k1
conv 16x112x112 64 k1
conv 64x112x112 64 k3 s2 p1 g64
conv 64x56x56 24 k1
conv 24x56x56 72 k1
conv 72x56x56 72 k3 p1 g72
conv 72x56x56 24 k1
conv 72x56x56 72 k5 s2 p2 g72
conv 72x1x1 24 k1
conv 24x1x1 72 k1
conv 72x28x28 40 k1
conv 40x28x28 120 k1
conv 120x28x28 120 k5 p2 g120
conv 120x1x1 32 k1
conv 32x1x1 120 k1
conv 120x28x28 40 k1
conv 40x28x28 240 k1
conv 240x28x28 240 k3 s2 p1 g240
conv 240x14x14 80 k1
conv 80x14x14 200 k1
conv 200x14x14 200 k3 p1 g200
conv 200x14x14 80 k1
conv 80x14x14 184 k1
conv 184x14x14 184 k3 p1 g184
conv 184x14x14 80 k1
conv 80x14x14 480 k1
conv 480x14x14 480 k3 p1 g480
conv 480x1x1 120 k1
conv 120x1x1 480 k1
conv 480x14x14 112 k1
conv 112x14x14 672 k1
conv 672x14x14 672 k3 p1 g672
conv 672x1x1 168 k1
conv 168x1x1 672 k1
conv 672x14x14 112 k1
conv 672x14x14 672 k5 s2 p2 g672
conv 672x7x7 160 k1
conv 960x7x7 960 k5 p2 g960
conv 960x1x1 240 k1
conv 240x1x1 960 k1
linear 1x960 1280
# efficientnet_b0
conv 32x1x1 8 k1
conv 8x1x1 32 k1
conv 96x1x1 4 k1
conv 4x1x1 96 k1
conv 144x1x1 6 k1
conv 6x1x1 144 k1
conv 144x56x56 144 k5 s2 p2 g144
conv 144x28x28 40 k1
conv 240x28x28 240 k5 p2 g240
conv 240x1x1 10 k1
conv 10x1x1 240 k1
conv 240x28x28 40 k1
conv 480x1x1 20 k1
conv 20x1x1 480 k1
conv 480x14x14 80 k1
conv 480x14x14 480 k5 p2 g480
conv 672x14x14 672 k5 p2 g672
conv 672x1x1 28 k1
conv 28x1x1 672 k1
conv 672x7x7 192 k1
conv 192x7x7 1152 k1
conv 1152x7x7 1152 k5 p2 g1152
conv 1152x1x1 48 k1
conv 48x1x1 1152 k1
conv 1152x7x7 192 k1
conv 1152x7x7 1152 k3 p1 g1152
conv 1152x7x7 320 k1
# squeezenet1_1
conv 3x224x224 64 k3 s2
conv 64x55x55 16 k1
conv 16x55x55 64 k1
conv 16x55x55 64 k3 p1
conv 128x55x55 16 k1
conv 128x27x27 32 k1
conv 32x27x27 128 k1
conv 32x27x27 128 k3 p1
conv 256x27x27 32 k1
conv 256x13x13 48 k1
conv 48x13x13 192 k1
conv 48x13x13 192 k3 p1
conv 384x13x13 48 k1
conv 384x13x13 64 k1
conv 64x13x13 256 k1
conv 64x13x13 256 k3 p1
conv 512x13x13 64 k1
conv 512x13x13 1000 k1
# vit_tiny
conv 3x224x224 192 k16 s16
linear 197x192 576
attention 3x197x64x197x64
linear 197x192 192
linear 197x192 768
linear 197x768 192
linear 1x192 1000
# minilm_l6
linear 128x384 384
attention 12x128x32x128x32
linear 128x384 1536
linear 128x1536 384
# bert_base
linear 128x768 768
attention 12x128x64x128x64
linear 128x768 3072
linear 128x3072 768
"""

COMMON_LAYERS = tuple(line for line in _TEXT.split("\n") if line and not line.startswith("#"))
