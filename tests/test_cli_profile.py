"""`graphopt profile`: the table, the JSON, the trace file and the errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import graphopt
from graphopt.cli import app
from graphopt.runtime.profile import StepTime, as_json, by_kind, chosen, chrome_trace, gbytes


def profile(*args: str | Path) -> Result:
    return CliRunner().invoke(app, ["profile", *map(str, args)])


class Net(nn.Module):
    """A convolution and a linear layer: two steps or more, of two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def build(folder: Path, target: str = "host") -> Path:
    torch.manual_seed(0)
    compiled = graphopt.compile(Net().eval(), torch.zeros(1, 3, 20, 20), name="net", target=target)
    return compiled.export(folder).folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("profile") / "out")


def test_tables_show_steps_kinds_and_origins(built: Path) -> None:
    result = profile(built, "--repeat", "3", "--threads", "2")
    assert result.exit_code == 0, result.output
    for word in ("net, 2 threads", "fastest of 3 runs", "GFLOP/s", "GB/s", "conv_direct", "gemm",
                 "convolution + relu", "head (Linear)", "all"):  # fmt: skip
        assert word in result.stdout
    limited = profile(built, "--repeat", "3", "--limit", "1").stdout
    assert "and 2 steps more" in limited
    assert "all" in limited


def test_json_has_every_figure(built: Path) -> None:
    result = profile(built, "--repeat", "5", "--sort", "order", "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    steps = data["steps"]
    manifest = json.loads((built / "net.json").read_text())["steps"]
    assert (data["name"], data["threads"], data["runs"]) == ("net", 1, 5)
    assert [step["step"] for step in steps] == list(range(len(manifest)))
    for step, entry in zip(steps, manifest, strict=True):
        for key in ("kernel", "generator", "ops", "origin", "tasks", "flops", "bytes_read",
                    "bytes_written"):  # fmt: skip
            assert step[key] == entry[key]
        seconds = step["ms"] / 1e3
        assert step["gflops_per_s"] == pytest.approx(step["flops"] / seconds / 1e9)
        moved = step["bytes_read"] + step["bytes_written"]
        assert step["gb_per_s"] == pytest.approx(moved / seconds / 1e9)
    assert sum(step["share"] for step in steps) == pytest.approx(1)
    assert sum(step["ms"] for step in steps) == pytest.approx(data["ms"])
    assert sum(kind["steps"] for kind in data["kinds"]) == len(steps)
    (first,) = json.loads(profile(built, "--limit", "1", "--repeat", "1", "--json").stdout)["steps"]
    assert first["share"] > 1 / len(steps)


def test_bytes_are_those_of_the_buffers(built: Path) -> None:
    (conv, *_, head) = json.loads((built / "net.json").read_text())["steps"]
    # The image, 16 filters and a bias; the result has 18 × 18 pixels. All multiples of a block.
    assert conv["bytes_read"] == 4 * (3 * 20 * 20 + 16 * 3 * 9 + 16)
    assert conv["bytes_written"] == 4 * 16 * 18 * 18
    assert head["bytes_written"] == 4 * 10


def test_trace_lays_the_steps_end_to_end(built: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = profile(built, "--repeat", "2", "--limit", "1", "--trace", path)
    assert result.exit_code == 0, result.output
    trace = json.loads(path.read_text("utf-8"))
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(events) == len(json.loads((built / "net.json").read_text())["steps"])
    end = 0.0
    for number, event in enumerate(events):
        assert event["ts"] == pytest.approx(end)
        assert event["dur"] > 0
        assert event["args"]["step"] == number
        assert event["args"]["origin"]
        end += event["dur"]
    assert events[0]["name"] == "convolution + relu"
    assert events[0]["args"]["GFLOP/s"] > 0


def test_errors(built: Path, tmp_path: Path) -> None:
    older = shutil.copytree(built, tmp_path / "older")
    manifest = json.loads((older / "net.json").read_text())
    for step in manifest["steps"]:
        del step["bytes_read"]
    (older / "net.json").write_text(json.dumps(manifest))
    for folder, *words in (
        (tmp_path / "nowhere", "is not a folder"),
        (built / "net.json", "is not a folder"),
        (tmp_path, "0 manifests"),
        (older, "older graphopt", "compile the model again"),
        (build(tmp_path / "arm", "arm"), "emulator", "on the board"),
    ):
        result = profile(folder)
        assert result.exit_code == 1, result.output
        assert result.stdout == ""
        assert all(word in result.stderr for word in words), result.stderr
    no_such_folder = profile(built, "--repeat", "1", "--trace", tmp_path / "no" / "trace.json")
    assert no_such_folder.exit_code == 1
    assert "trace.json" in no_such_folder.stderr
    for wrong in (("--sort", "name"), ("--limit", "0"), ("--threads", "0")):
        assert profile(built, *wrong).exit_code == 2


def step(number: int, generator: str, seconds: float) -> StepTime:
    return StepTime(number, f"k{number}", generator, ("op",), ("here",), 1, 100, 30, 10, seconds)


def test_order_and_sums() -> None:
    steps = [step(0, "map flat", 1.0), step(1, "gemm 16×6", 2.0), step(2, "map", 3.0)]
    assert [each.number for each in chosen(steps, "order", None)] == [0, 1, 2]
    assert [each.number for each in chosen(steps, "time", 2)] == [2, 1]
    assert [(each.kind, each.steps, each.seconds) for each in by_kind(steps)] == [
        ("map", 2, 4.0), ("gemm", 1, 2.0),
    ]  # fmt: skip
    assert gbytes(by_kind(steps)[0]) == pytest.approx(80 / 4.0 / 1e9)
    assert [each["share"] for each in as_json(steps, "time", None)["steps"]] == pytest.approx(
        [3 / 6, 2 / 6, 1 / 6]
    )


def test_a_step_too_short_to_time_has_no_rate() -> None:
    steps = [step(0, "map", 0.0)]
    assert as_json(steps, "order", None)["steps"][0]["gb_per_s"] == 0
    assert chrome_trace("m", 1, steps)["traceEvents"][-1]["args"]["GFLOP/s"] == 0
