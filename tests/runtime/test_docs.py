"""The program in docs/artifact.md does what the page says, with both of its linking lines."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from runtime_programs import compile_kernels, output_of, tool

from graphopt.backends.target import Target, get_target
from graphopt.program.ir import Buffer, Kernel, Program, Step
from graphopt.runtime.artifact import Artifact, build_artifact
from graphopt.runtime.devices import find_emulator

PAGE = Path(__file__).parents[2] / "docs" / "artifact.md"
PIXELS, CLASSES, BEST = 3 * 224 * 224, 1000, 281

# A classifier of sorts: the class is the first pixel, through the arena.
_KERNELS = """
#include <stdint.h>
void mobilenet_k_copy(float *image, float *copy, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++) copy[i] = image[i];
}
void mobilenet_k_classify(float *copy, float *logits, int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; i++) logits[i] = i == (int32_t)copy[0] ? 1.5f : 0.0f;
}
"""


def classifier(folder: Path, target: Target) -> Artifact:
    buffers = (
        Buffer("image", (1, 3, 224, 224), "float32", "plain", "input", PIXELS * 4),
        Buffer("copy", (PIXELS,), "float32", "plain", "arena", PIXELS * 4),
        Buffer("logits", (1, CLASSES), "float32", "plain", "output", CLASSES * 4),
    )
    steps = (
        Step(Kernel("copy", None, "C"), ("image", "copy"), ("image",), ("copy",), PIXELS, 1024),
        Step(Kernel("classify", None, "C"), ("copy", "logits"), ("copy",), ("logits",), CLASSES),
    )
    program = Program("mobilenet", steps, {b.name: b for b in buffers}, ("image",), ("logits",),
                      PIXELS * 4, 0, 0)  # fmt: skip
    return build_artifact(program, target, compile_kernels(_KERNELS, target), folder)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize("target", ["host", "arm"])
def test_the_program_compiles_with_both_lines_and_classifies(tmp_path: Path, target: str) -> None:
    artifact = classifier(tmp_path / "out", get_target(target))
    assert sorted(path.name for path in artifact.folder.iterdir()) == sorted(
        re.findall(r"^  (\S*mobilenet\.\w+)", blocks("")[0], re.M)
    )
    (program,) = blocks("c")
    (tmp_path / "classify.c").write_text(program, encoding="utf-8")
    image = np.zeros(PIXELS, np.float32)
    image[0] = BEST
    run: list[str] = ["./classify"]
    compiler = tool("gcc", "gcc")
    if target == "arm":
        compiler = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
        run = [find_emulator("aarch64"), "-L", "/usr/aarch64-linux-gnu", *run]
    lines = blocks("sh")
    assert len(lines) == 2
    for line in lines:
        command = shlex.split(line)
        assert command[0] == "cc"
        strict = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic")
        output_of(compiler, *strict, *command[1:], cwd=tmp_path)
        if "-lmobilenet" in command:
            # Beside the program, as the page says.
            (tmp_path / "libmobilenet.so").write_bytes(artifact.library.read_bytes())
        result = subprocess.run(run, cwd=tmp_path, input=image.tobytes(), capture_output=True)
        assert result.stdout.decode() == f"class {BEST}, logit 1.500\n", result.stderr
        result = subprocess.run(run, cwd=tmp_path, input=b"short", capture_output=True)
        assert result.returncode == 1


def test_every_status_and_function_is_on_the_page(tmp_path: Path) -> None:
    header = (classifier(tmp_path / "out", get_target("host")).folder / "mobilenet.h").read_text()
    page = PAGE.read_text("utf-8")
    for code, name in re.findall(r"MOBILENET(_OK|_ERROR_\w+) = (\d)", header):
        assert f"| {name} | `{code}` |" in page
    functions = set(re.findall(r"\bmobilenet_(\w+)\(", header)) - {"status"}
    assert functions == set(re.findall(r"^\| `mobilenet_(\w+)\(", page, re.M))
