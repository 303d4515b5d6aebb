"""Every zoo model, imported and run in PyTorch, equals the model or ONNX Runtime."""

import hashlib

import numpy as np
import pytest
import torch

from graphopt.importers import import_model
from tests.importers.onnx_cases import check_form, run_reference
from tests.models import zoo

CASES = [(name, 1) for name in zoo.MODELS] + [("mobilenet_v2", 3), ("ppocr_rec", 3)]
# × the largest output; the import keeps the operators, so only their order of sums differs.
TOLERANCE = 5e-5


def state_hash(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    for name, part in module.named_modules():
        digest.update(f"{name} {part.training} {len(part._forward_hooks)}".encode())
    return digest.hexdigest()


def file_hash(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "batch"), CASES)
def test_zoo(name, batch):
    entry = zoo.MODELS[name]
    model, arrays = entry.model(), entry.inputs(batch, seed=1)
    tensors = [torch.from_numpy(array) for array in arrays.values()]
    before = state_hash(model) if entry.kind == "torch" else file_hash(model)

    gm = import_model(model, entry.onnx_inputs(batch))

    assert before == (state_hash(model) if entry.kind == "torch" else file_hash(model))
    check_form(gm)
    assert gm.meta["input_names"] == tuple(arrays)
    with torch.no_grad():
        have = [result.numpy() for result in gm(*tensors)]
        torch_model = entry.kind == "torch"
        want = [model(*tensors).numpy()] if torch_model else run_reference(model, arrays)
    for a, b in zip(have, want, strict=True):
        assert a.shape == b.shape
        assert float(np.abs(a - b).max()) <= TOLERANCE * float(np.abs(b).max())
        assert float(b.std()) > 0  # a constant output would compare equal to anything


def test_light_models_as_shipped_say_nothing():
    """Why the zoo gives them random weights: as they are, every class is equally likely."""
    from tests.models.light import light_model

    x = zoo.MODELS["light_squeezenet"].inputs()
    shipped = run_reference(light_model("squeezenet", randomize=False), x)[0]
    assert float(shipped.std()) < 1e-9
    assert float(run_reference(light_model("squeezenet"), x)[0].std()) > 1e-4


def test_photos():
    photos = zoo.imagenet_photos()
    assert len(photos) == 20
    model = zoo.MODELS["mobilenet_v2"].model()
    batch = np.concatenate([zoo.preprocess_mobilenet_v2(photo.pixels) for photo in photos])
    with torch.no_grad():
        top = model(torch.from_numpy(batch)).argmax(1).tolist()
    assert sum(a == photo.label for a, photo in zip(top, photos, strict=True)) == 18
