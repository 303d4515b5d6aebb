"""`graphopt.compile` as a user calls it: inputs and outputs, refusals, reproducible builds."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import graphopt


class Small(nn.Module):
    """Two inputs, two outputs, a bit of everything."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 10, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 4)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = torch.relu(self.norm(self.conv(image))) * scale
        return self.head(x.mean((2, 3))), x


def digest(model: nn.Module) -> str:
    """A hash over everything a model holds."""
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode() + tensor.numpy().tobytes())
    return state.hexdigest() + str([m.training for m in model.modules()]) + repr(model)


@pytest.fixture(scope="module")
def example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 11, 9, generator=generator), torch.rand(1, generator=generator)


@pytest.fixture(scope="module")
def compiled(example: tuple[torch.Tensor, torch.Tensor]) -> graphopt.Compiled:
    return graphopt.compile(Small().eval(), example, name="small")


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    # A handful of float32 roundings over sums of 27 products.
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_numpy_in_numpy_out(compiled: graphopt.Compiled, example: tuple[torch.Tensor, ...]) -> None:
    expected = Small().eval()(*example)
    result = compiled(*(x.numpy() for x in example))
    assert isinstance(result, tuple)
    for ours, theirs in zip(result, expected, strict=True):
        assert isinstance(ours, np.ndarray)
        close(ours, theirs.detach().numpy())


def test_torch_in_torch_out_and_inputs_by_name(
    compiled: graphopt.Compiled, example: tuple[torch.Tensor, ...]
) -> None:
    expected = Small().eval()(*example)
    result = compiled(scale=example[1], image=example[0])
    for ours, theirs in zip(result, expected, strict=True):
        assert isinstance(ours, torch.Tensor)
        close(ours.numpy(), theirs.detach().numpy())


def test_one_output_comes_bare() -> None:
    model = nn.Sequential(nn.Linear(5, 3), nn.Softmax(-1)).eval()
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    result = graphopt.compile(model, x)(x)
    assert isinstance(result, torch.Tensor)
    close(result.numpy(), model(x).detach().numpy())


def test_the_graph_still_runs_in_pytorch(
    compiled: graphopt.Compiled, example: tuple[torch.Tensor, ...]
) -> None:
    for ours, theirs in zip(compiled.graph(*example), Small().eval()(*example), strict=True):
        close(ours.detach().numpy(), theirs.detach().numpy())


def test_the_model_is_left_as_it_was(example: tuple[torch.Tensor, ...]) -> None:
    model = Small().eval()
    before = digest(model)
    graphopt.compile(model, example)(*example)
    assert digest(model) == before


def test_export_and_load(
    compiled: graphopt.Compiled, example: tuple[torch.Tensor, ...], tmp_path: Path
) -> None:
    compiled.export(tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"libsmall.so", "libsmall.a", "small.h", "small.json", "small.py"}
    code = f"""
        import sys, numpy as np, graphopt
        model = graphopt.load({str(tmp_path / "out")!r})
        y, x = model(np.ones((2, 3, 11, 9), np.float32), scale=np.ones(1, np.float32))
        assert y.shape == (2, 4) and x.shape == (2, 10, 6, 5)
        assert not {{"torch", "tvm", "onnx"}} & set(sys.modules), "a heavy import"
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_report_as_text_and_as_data(compiled: graphopt.Compiled) -> None:
    text = str(compiled.report)
    for wanted in ("fold_batch_norm", "conv_direct", "arena", "weights", "Conv2d"):
        assert wanted in text
    data = compiled.report.as_dict()
    json.dumps(data)
    assert next(p["name"] for p in data["passes"]) == "canonicalize"
    assert {"arena", "weights"} <= set(data["memory"])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((np.zeros((2, 3, 11, 9), np.float32),), "scale"),
        ((np.zeros((2, 3, 11, 8), np.float32), np.zeros(1, np.float32)), "image"),
        ((np.zeros((2, 3, 11, 9), np.int32), np.zeros(1, np.float32)), "image"),
        ((np.zeros((2, 3, 11, 9), np.float32),) * 3, "3"),
    ],
    ids=["count", "shape", "dtype", "too many"],
)
def test_wrong_inputs(
    compiled: graphopt.Compiled, inputs: tuple[np.ndarray, ...], message: str
) -> None:
    with pytest.raises(graphopt.InputError, match=message):
        compiled(*inputs)


def test_unknown_target_offers_the_nearest() -> None:
    with pytest.raises(graphopt.TargetError, match="rpi4"):
        graphopt.compile(nn.ReLU().eval(), torch.ones(1), target="rpi-4")


@pytest.mark.parametrize("name", ["1st", "my model", "a-b", "for", ""])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(graphopt.GraphoptError, match="name"):
        graphopt.compile(nn.ReLU().eval(), torch.ones(1), name=name)


def test_all_unsupported_operators_at_once() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.logcumsumexp(x, 0) + torch.erfinv(x)

    with pytest.raises(graphopt.UnsupportedError) as caught:
        graphopt.compile(Strange().eval(), torch.eye(3))
    text = str(caught.value)
    assert "logcumsumexp" in text
    assert "erfinv" in text
    assert "test_compile.py" in text, "the source line is missing"


def test_unsupported_operators_with_several_results() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values, places = torch.mode(x)
            return values, places, torch.cummax(x, 0)[0]

    with pytest.raises(graphopt.UnsupportedError, match=r"2 operator call\(s\)") as caught:
        graphopt.compile(Strange().eval(), torch.eye(3))
    text = str(caught.value)
    assert "aten::mode: no such operator" in text
    assert "aten::cummax: no such operator" in text
    assert "getitem" not in text


def test_weights_standardized_in_each_run_are_folded() -> None:
    class Standardized(nn.Conv2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            gain = torch.linspace(0.5, 1.5, self.out_channels)
            weight = nn.functional.batch_norm(flat, None, None, gain, training=True, eps=1e-6)
            return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)

    torch.manual_seed(0)
    model, x = Standardized(3, 8, 3).eval(), torch.randn(2, 3, 10, 9)
    compiled = graphopt.compile(model, x)
    assert len(compiled.report.as_dict()["kernels"]) == 1
    with torch.no_grad():
        close(compiled(x), model(x).numpy())


def test_no_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("GRAPHOPT_CC_AARCH64", raising=False)
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(graphopt.ToolchainError, match="gcc-aarch64-linux-gnu"):
        graphopt.compile(nn.ReLU().eval(), torch.ones(1), target="rpi4")


_BUILD = """
    import sys, torch, graphopt
    sys.path.insert(0, sys.argv[2])
    from test_compile import Small
    x = torch.ones(2, 3, 11, 9), torch.ones(1)
    graphopt.compile(Small().eval(), x, target="arm", name="small").export(sys.argv[1])
"""


def test_two_builds_in_two_processes_are_identical(tmp_path: Path) -> None:
    contents = []
    for seed in ("1", "2"):
        folder = tmp_path / seed / "out"
        folder.parent.mkdir()
        subprocess.run(
            [
                sys.executable,
                "-c",
                textwrap.dedent(_BUILD),
                str(folder),
                str(Path(__file__).parent),
            ],
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0].keys() == contents[1].keys()
    for name, data in contents[0].items():
        assert data == contents[1][name], f"{name} differs"


@pytest.mark.parametrize("seconds", [0.5, 3.0, 4.5])
def test_a_killed_build_leaves_no_output(tmp_path: Path, seconds: float) -> None:
    folder = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_BUILD), str(folder), str(Path(__file__).parent)]
    )
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    # Either it was killed and there is nothing, or it was done and all is there.
    assert not folder.exists() or len(list(folder.iterdir())) == 5


def test_strassen_can_be_refused() -> None:
    """It rounds differently, and takes no more memory for weights."""
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    x = torch.randn(1, 128, 256, generator=torch.Generator().manual_seed(0))
    fast = graphopt.compile(model, x)
    exact = graphopt.compile(model, x, strassen=False)
    kinds = [[step.kernel.origin.split()[0] for step in c.program.steps] for c in (fast, exact)]
    assert "strassen" in kinds[0]
    assert "strassen" not in kinds[1]
    assert fast.program.weights == exact.program.weights
    expected = model(x).detach().numpy()
    close(exact(x).numpy(), expected)
    close(fast(x).numpy(), expected)


def test_winograd_can_be_refused() -> None:
    """Without it the weights are no larger than the model's, padded to whole blocks."""
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 8, 1))
    x = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    fast = graphopt.compile(model.eval(), x)
    small = graphopt.compile(model.eval(), x, winograd=False)
    kinds = [[step.kernel.origin.split()[0] for step in c.program.steps] for c in (fast, small)]
    assert kinds[0][1] == "winograd"
    assert "winograd" not in kinds[1]
    assert small.program.weights < fast.program.weights / 2
    close(small(x).numpy(), model(x).detach().numpy())
