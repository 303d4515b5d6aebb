"""The benchmark's models in the formats of MNN and ncnn, kept in the cache."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.onnx_models import BenchModel
from bench.peers import environment

_PNNX_TYPES = {"float32": "f32", "int64": "i64", "int32": "i32", "bool": "b8"}


class ConversionError(Exception):
    """A peer's converter refuses the model."""


def mnn_file(model: BenchModel) -> Path:
    """The model as .mnn; converted when the cache does not hold it.

    Raises:
        ConversionError: MNN cannot convert it.
    """
    converter = environment.HERE / "convert_mnn.py"
    command = [str(environment.python()), str(converter), "model.onnx", "model.mnn"]
    return _converted(model, "mnn", command, ["model.mnn"])


def ncnn_file(model: BenchModel) -> Path:
    """The model's .ncnn.param, beside its .ncnn.bin; converted when the cache does not hold them.

    Raises:
        ConversionError: pnnx cannot convert it.
    """
    shapes = [
        f"[{','.join(map(str, array.shape))}]{_PNNX_TYPES[array.dtype.name]}"
        for array in model.inputs.values()
    ]
    pnnx = str(environment.python().with_name("pnnx"))
    command = [pnnx, "model.onnx", f"inputshape={','.join(shapes)}", "fp16=0"]
    return _converted(model, "ncnn", command, ["model.ncnn.param", "model.ncnn.bin"])


def _converted(
    model: BenchModel, system: str, command: Sequence[str], names: Sequence[str]
) -> Path:
    """The first of the files that the command makes of the `model.onnx` it finds beside it."""
    shapes = "-".join("x".join(map(str, array.shape)) for array in model.inputs.values())
    versions = environment.digest([environment.REQUIREMENTS, model.path])[:16]
    place = environment.folder() / "converted" / f"{model.name}-{shapes}-{versions}" / system
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".") as work:
            _convert(model.path, Path(work), command, names, place)
    refusal = place / "refused"
    if refusal.exists():
        raise ConversionError(refusal.read_text())
    return place / names[0]


def _convert(
    source: Path, work: Path, command: Sequence[str], names: Sequence[str], place: Path
) -> None:
    """Run the converter in `work`; `place` then holds the files it made, or why it made none."""
    (work / "model.onnx").symlink_to(source.resolve())
    done = subprocess.run(
        command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    finished = work / "finished"
    finished.mkdir()
    if done.returncode == 0 and all((work / name).exists() for name in names):
        for name in names:
            shutil.move(work / name, finished / name)
    else:
        last = "; ".join(done.stdout.decode(errors="replace").strip().splitlines()[-3:])
        reason = f"its converter ended with {done.returncode}: {last or 'no message'}"
        (finished / "refused").write_text(reason)
    os.replace(finished, place)
