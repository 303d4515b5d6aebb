"""The `graphopt` command: every subcommand, its JSON, its errors and exit statuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from typer.testing import CliRunner, Result

from graphopt.cli import app
from graphopt.cli_inputs import InputSpec, example_inputs, parse_specs, read_arrays

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4) / 10


def graphopt(*args: str | Path, **kwargs: Any) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args], **kwargs)


def save_onnx(path: Path, batch: int | str = 2, op: str = "MatMul") -> Path:
    """`y = op(x, w)` with x of batch × 3; two inputs more would prove nothing."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"], name="only")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 4])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build of `y = x @ w` for this machine."""
    folder = tmp_path_factory.mktemp("cli")
    result = graphopt("compile", save_onnx(folder / "m.onnx"), "-o", folder / "out", "--name", "m")
    assert result.exit_code == 0, result.output
    return folder / "out"


def test_compile_lists_the_files(tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "m.onnx")
    result = graphopt("compile", model, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    for name in ("libmodel.so", "libmodel.a", "model.h", "model.json", "model.py"):
        assert (tmp_path / "out" / name).is_file()
        assert name in result.stdout
    assert "compiling the kernels" in result.stderr
    assert "compiling the kernels" not in result.stdout


def test_compile_for_another_cpu_with_an_open_dimension(tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "m.onnx", batch="N")
    result = graphopt(
        "compile", model, "-o", tmp_path / "out", "--target", "rpi4", "--input", "x:5x3", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["target"] == "rpi4"
    assert set(data["files"]) == {
        "libmodel.so", "libmodel.a", "model.h", "model.json", "model.py",
    }  # fmt: skip
    assert data["report"]["kernels"]
    manifest = json.loads((tmp_path / "out" / "model.json").read_text())
    assert manifest["inputs"][0]["shape"] == [5, 3]


def test_compile_a_pt2_file(tmp_path: Path) -> None:
    program = torch.export.export(nn.Linear(3, 2).eval(), (torch.zeros(1, 3),))
    torch.export.save(program, tmp_path / "m.pt2")
    result = graphopt("compile", tmp_path / "m.pt2", "-o", tmp_path / "out", "--report")
    assert result.exit_code == 0, result.output
    assert "linear" in result.stdout
    assert "arena" in result.stdout


def test_compile_with_chosen_passes(tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "m.onnx")
    result = graphopt(
        "compile", model, "-o", tmp_path / "out", "--passes", "canonicalize,simplify", "--json"
    )
    assert result.exit_code == 0, result.output
    passes = json.loads(result.stdout)["report"]["passes"]
    assert [each["name"] for each in passes] == ["canonicalize", "simplify"]


def test_run_writes_outputs(built: Path, tmp_path: Path) -> None:
    x = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    np.save(tmp_path / "x.npy", x)
    for given in (tmp_path / "x.npz", tmp_path / "x.npy", f"x={tmp_path / 'x.npy'}"):
        result = graphopt("run", built, "--input", given, "--output", tmp_path / "y.npz")
        assert result.exit_code == 0, result.output
        np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], x @ WEIGHT, rtol=1e-6)
    result = graphopt(
        "run", built, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy", "--json"
    )
    (output,) = json.loads(result.stdout)["outputs"]
    assert output["name"] == "y"
    assert output["shape"] == [2, 4]
    assert output["argmax"] == [1, 3]
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), x @ WEIGHT, rtol=1e-6)


def test_bench(built: Path) -> None:
    result = graphopt("bench", built, "--threads", "2", "--repeat", "20", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["threads"] == 2
    assert data["runs"] == 20
    assert 0 < data["min_ms"] <= data["median_ms"] <= data["p99_ms"]
    assert "p99" in graphopt("bench", built, "--repeat", "5").stdout


def test_inspect(built: Path) -> None:
    text = graphopt("inspect", built).stdout
    for word in ("m for host", "float32", "2×3", "arena", "libm.so", "linear"):
        assert word in text
    data = json.loads(graphopt("inspect", built, "--json").stdout)
    assert data == json.loads((built / "m.json").read_text())


def test_targets_and_passes() -> None:
    names = [each["name"] for each in json.loads(graphopt("targets", "--json").stdout)]
    assert names[0] == "host"
    assert {"x86-64-v3", "arm", "cortex-a53", "rpi5"} <= set(names)
    table = graphopt("targets").stdout
    assert all(name in table for name in names)
    passes = json.loads(graphopt("passes", "--json").stdout)
    assert all(each["name"] and each["effect"] and each["summary"] for each in passes)
    assert "fold_batch_norm" in graphopt("passes").stdout


def assert_error(result: Result, *words: str) -> None:
    """Exit status 1, a message on standard error, nothing on standard output, no traceback."""
    assert result.exit_code == 1, result.output
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_errors_name_the_problem_and_the_remedy(built: Path, tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "m.onnx")
    out = tmp_path / "out"
    assert_error(graphopt("compile", tmp_path / "n.onnx", "-o", out), "no file", "hint")
    assert_error(graphopt("compile", model, "-o", out, "--target", "rpi6"), "rpi6", "rpi5")
    assert_error(graphopt("compile", model, "-o", out, "--passes", "simplfy"), "simplify")
    assert_error(graphopt("compile", model, "-o", out, "--cc", "no-such-cc"), "no-such-cc")
    assert_error(graphopt("compile", model, "-o", out, "--input", "z:2x3"), "'z'", "'x'")
    assert_error(graphopt("compile", model, "-o", out, "--name", "1st"), "1st")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    assert_error(graphopt("compile", broken, "-o", out, "--json"), "broken.onnx")
    strange = save_onnx(tmp_path / "strange.onnx", op="NoSuchOperator")
    assert_error(graphopt("compile", strange, "-o", out), "NoSuchOperator", "only")
    assert not out.exists()

    assert_error(graphopt("inspect", tmp_path), "0 manifests")
    assert_error(graphopt("run", built, "--input", tmp_path / "x.npy"), "no file")
    broken.rename(tmp_path / "broken.npy")
    assert_error(graphopt("run", built, "--input", tmp_path / "broken.npy"), "cannot read")
    np.save(tmp_path / "x.npy", np.zeros((2, 4), np.float32))
    assert_error(graphopt("run", built, "--input", tmp_path / "x.npy"), "[2, 4]", "[2, 3]")
    np.savez(tmp_path / "x.npz", z=np.zeros((2, 3), np.float32))
    assert_error(graphopt("run", built, "--input", tmp_path / "x.npz"), "'z'")
    np.save(tmp_path / "x.npy", np.zeros((2, 3), np.float32))
    assert_error(
        graphopt("run", built, "--input", tmp_path / "x.npy", "--output", tmp_path / "y.txt"),
        ".npz",
    )


def test_usage_errors_have_their_own_status(built: Path, tmp_path: Path) -> None:
    model = save_onnx(tmp_path / "m.onnx")
    for args in (
        ("compile", model),
        ("compile", model, "-o", tmp_path / "out", "--input", "x"),
        ("compile", model, "-o", tmp_path / "out", "--input", "x:2x3:flaot32"),
        ("compile", model, "-o", tmp_path / "out", "--threads", "0"),
        ("bench", built, "--repeat", "0"),
        ("no-such-command",),
    ):
        result = graphopt(*args)
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = graphopt("--debug", "inspect", tmp_path)
    assert type(result.exception).__name__ == "ArtifactError"
    result = graphopt("inspect", tmp_path, env={"GRAPHOPT_DEBUG": "1"})
    assert type(result.exception).__name__ == "ArtifactError"


def test_bugs_are_told_apart_from_errors(monkeypatch: pytest.MonkeyPatch, built: Path) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("graphopt.runtime.load.load", broken)
    assert_error(graphopt("bench", built), "bug in graphopt", "surprise", "GRAPHOPT_DEBUG")


def test_command_starts_without_torch_and_tvm() -> None:
    code = (
        "import sys\n"
        "from graphopt.cli import app\n"
        "try:\n    app(['targets', '--json'])\n"
        "except SystemExit as exit:\n    assert not exit.code\n"
        "heavy = sorted({'torch', 'tvm', 'onnx', 'numpy'} & set(sys.modules))\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["name"] == "host"


def test_installed_command() -> None:
    command = Path(sys.executable).with_name("graphopt")
    done = subprocess.run([command, "--version"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("graphopt ")


def test_input_specs() -> None:
    assert parse_specs(["x:1x3x4", "ids:0:1x64:int64", "t:scalar", "n:7"]) == [
        InputSpec("x", (1, 3, 4), None),
        InputSpec("ids:0", (1, 64), "int64"),
        InputSpec("t", (), None),
        InputSpec("n", (7,), None),
    ]
    for wrong in ("x", "x:", ":1x2", "x:1x", "x:1,2", "x:ax3"):
        with pytest.raises(ValueError, match="NAME:1x3x224x224"):
            parse_specs([wrong])
    with pytest.raises(ValueError, match="twice"):
        parse_specs(["x:1", "x:2"])


def test_example_inputs_take_the_dtype_from_the_model(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Identity", ["ids"], ["y"])],
        "g",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.INT64, ["N"])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    arrays = example_inputs(parse_specs(["ids:4"]), tmp_path / "m.onnx")
    assert arrays is not None
    assert arrays["ids"].dtype == np.int64
    assert arrays["ids"].shape == (4,)
    assert example_inputs([], tmp_path / "m.onnx") is None


def test_read_arrays_by_position_and_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a=b.npy", np.zeros(1))
    np.savez(tmp_path / "c.npz", c=np.ones(2))
    args, named = read_arrays(
        [str(tmp_path / "a=b.npy"), str(tmp_path / "c.npz"), f"d={tmp_path / 'a=b.npy'}"]
    )
    assert [array.shape for array in args] == [(1,)]
    assert {name: array.shape for name, array in named.items()} == {"c": (2,), "d": (1,)}
