"""`graphopt.tune` and `graphopt tune`: what is measured, what is stored, when it stops.

Times come from a clock that the tests make up, or nothing is asserted of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import graphopt
from graphopt import tuner
from graphopt.backends.tuning import TuningDatabase
from graphopt.cli import app
from graphopt.errors import TargetError, TuningError
from graphopt.program.ir import Program
from graphopt.runtime.devices import EmulatorDevice
from graphopt.runtime.loader import Array


class MadeUpDevice:
    """Runs nothing, and answers with the times of a function of the candidate's name."""

    def __init__(self, seconds: Callable[[str], float]) -> None:
        self.seconds = seconds
        self.calls: list[str] = []

    def __str__(self) -> str:
        return "made up"

    def run(
        self, folder: Path, inputs: Sequence[Array], *, threads: int | None = None
    ) -> tuple[Array, ...]:
        raise NotImplementedError

    def time(
        self,
        folder: Path,
        inputs: Sequence[Array],
        *,
        repeats: int = 10,
        warmup: int = 1,
        threads: int | None = None,
    ) -> list[float]:
        built = json.loads((folder / "built.json").read_text("utf-8"))
        assert [list(x.shape) for x in inputs] == built["shapes"]
        assert all(x.dtype == np.float32 for x in inputs)
        assert threads == 2
        assert repeats >= 3
        (name,) = {generator.removesuffix(" (tuned)") for generator in built["generators"]}
        self.calls.append(name)
        return [self.seconds(name) * len(built["generators"])] * repeats


def note_build(program: Program, *args: object, **_: object) -> None:
    """Instead of building an artifact: what `MadeUpDevice` needs to know of it."""
    *_, folder = args
    assert isinstance(folder, Path)
    folder.mkdir(parents=True)
    built = {
        "shapes": [program.buffers[name].shape for name in program.inputs],
        "generators": [step.kernel.origin for step in program.steps],
    }
    (folder / "built.json").write_text(json.dumps(built), encoding="utf-8")


def model() -> tuple[nn.Module, torch.Tensor]:
    """Two layers, each with some ways to compute it."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16 * 16, 40))
    return layers.eval(), torch.randn(1, 8, 6, 6)


def tune(path: Path, device: MadeUpDevice, seconds: float | None = None) -> graphopt.Tuned:
    module, x = model()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuner, "compile_kernels", lambda *_: b"")
        patch.setattr(tuner, "build_artifact", note_build)
        return graphopt.tune(
            module, x, database=path, device=device, seconds=seconds, threads=2, target="host"
        )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuned.json"


def test_what_wins_is_stored_and_compiled(path: Path) -> None:
    default = {"conv_direct": "", "gemm": ""}

    def seconds(name: str) -> float:
        kind = name.split()[0]
        default[kind] = default[kind] or name
        return 1e-3 if name == default[kind] else 0.9e-3

    device = MadeUpDevice(seconds)
    tuned = tune(path, device)
    assert (len(tuned.measured), tuned.known, tuned.left) == (2, 0, 0)
    for each in tuned.measured:
        assert each.entry.default == default[each.entry.default.split()[0]]
        assert each.entry.choice != each.entry.default
        assert each.entry.seconds == pytest.approx(0.9e-3)
        assert each.entry.gain == pytest.approx(1 / 0.9)
        assert (each.entry.device, each.entry.threads) == ("made up", 2)
        assert each.origin
    stored = TuningDatabase.load(path)
    assert [stored[each.key] for each in tuned.measured] == [e.entry for e in tuned.measured]

    module, x = model()
    report = graphopt.compile(module, x, tune=path).report.as_dict()
    chosen = {f"{each.entry.choice} (tuned)" for each in tuned.measured}
    assert {kernel["generator"] for kernel in report["kernels"]} == chosen


def test_what_wins_by_the_noise_only_does_not_count(path: Path) -> None:
    first: list[str] = []

    def seconds(name: str) -> float:
        kinds = [known.split()[0] for known in first]
        if name.split()[0] not in kinds:
            first.append(name)
        return 1e-3 if name in first else 0.98e-3

    for each in tune(path, MadeUpDevice(seconds)).measured:
        assert each.entry.choice == each.entry.default
        assert each.entry.gain == 1


def test_luck_does_not_last(path: Path) -> None:
    calls: dict[str, int] = {}
    first: list[str] = []

    def seconds(name: str) -> float:
        calls[name] = calls.get(name, 0) + 1
        if not any(known.split()[0] == name.split()[0] for known in first):
            first.append(name)
        # Fast in the six rounds in which all take part, not in those to confirm it.
        return 0.5e-3 if name not in first and calls[name] <= 6 else 0.6e-3

    for each in tune(path, MadeUpDevice(seconds)).measured:
        assert each.entry.choice == each.entry.default


def test_slow_ones_stop_early(path: Path) -> None:
    first: list[str] = []

    def seconds(name: str) -> float:
        if not any(known.split()[0] == name.split()[0] for known in first):
            first.append(name)
        return 1e-3 if name in first else 2e-3

    device = MadeUpDevice(seconds)
    tune(path, device)
    assert all(device.calls.count(name) == 1 for name in set(device.calls))


def test_candidates_take_turns(path: Path) -> None:
    device = MadeUpDevice(lambda _: 1e-3)
    tune(path, device)
    names = list(dict.fromkeys(device.calls[:6]))
    turns = [name for name in device.calls if name.split()[0] == names[0].split()[0]]
    ways = len(set(turns))
    assert turns == turns[:ways] * (len(turns) // ways)


def test_known_kernels_are_left_alone(path: Path) -> None:
    tune(path, MadeUpDevice(lambda _: 1e-3))
    before = path.read_bytes()
    device = MadeUpDevice(lambda _: 1e-3)
    again = tune(path, device)
    assert (again.measured, again.known, again.left) == ((), 2, 0)
    assert not device.calls
    assert path.read_bytes() == before


def test_no_time_leaves_all_untuned(path: Path) -> None:
    device = MadeUpDevice(lambda _: 1e-3)
    tuned = tune(path, device, seconds=0)
    assert (tuned.measured, tuned.known, tuned.left) == ((), 0, 2)
    assert not device.calls
    assert not path.exists()


def test_an_interrupted_run_keeps_what_it_has(path: Path) -> None:
    def seconds(name: str) -> float:
        if path.exists():
            raise KeyboardInterrupt
        return 1e-3

    with pytest.raises(KeyboardInterrupt):
        tune(path, MadeUpDevice(seconds))
    assert len(TuningDatabase.load(path)) == 1
    assert tune(path, MadeUpDevice(lambda _: 1e-3)).known == 1
    assert len(TuningDatabase.load(path)) == 2


def test_what_others_wrote_meanwhile_stays(path: Path) -> None:
    tune(path, MadeUpDevice(lambda _: 1e-3))
    (key, *_) = TuningDatabase.load(path)
    entry = TuningDatabase.load(path)[key]
    path.unlink()

    def seconds(name: str) -> float:
        TuningDatabase({"of another": entry}).save(path)
        return 1e-3

    assert "of another" in tune(path, MadeUpDevice(seconds)).database
    assert "of another" in TuningDatabase.load(path)


def test_emulators_are_refused(path: Path) -> None:
    module, x = model()
    with pytest.raises(TargetError, match="emulator") as error:
        graphopt.tune(module, x, database=path, target="rpi4")
    assert "on the board" in error.value.hint
    with pytest.raises(TargetError, match="emulator"):
        graphopt.tune(module, x, database=path, device=EmulatorDevice())
    assert not path.exists()


def test_a_bad_database_is_refused_first(path: Path) -> None:
    path.write_text("not JSON", encoding="utf-8")
    device = MadeUpDevice(lambda _: 1e-3)
    with pytest.raises(TuningError, match="not a tuning database"):
        tune(path, device)
    assert not device.calls
    assert path.read_text(encoding="utf-8") == "not JSON"


# The command line


def save(folder: Path) -> Path:
    path = folder / "m.pt2"
    torch.export.save(torch.export.export(nn.Linear(16, 8).eval(), (torch.zeros(4, 16),)), path)
    return path


def test_the_command_measures_this_machine(tmp_path: Path, path: Path) -> None:
    file = save(tmp_path)
    result = CliRunner().invoke(app, ["tune", str(file), "--database", str(path), "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["entries"] == len(data["kernels"]) == 1
    (kernel,) = data["kernels"]
    assert kernel["seconds"] <= kernel["default_seconds"]
    assert "1/1 gemm" in result.stderr
    again = CliRunner().invoke(app, ["tune", str(file), "-d", str(path), "--threads", "2"])
    assert again.exit_code == 0, again.output
    assert "0 kernels measured, 1 known before, 0 left" in again.stdout

    built = ["compile", str(file), "-o", str(tmp_path / "out"), "--tune", str(path), "--json"]
    report = json.loads(CliRunner().invoke(app, built).stdout)["report"]
    assert report["kernels"][0]["generator"] == f"{kernel['choice']} (tuned)"


def test_the_command_stops_in_time(tmp_path: Path, path: Path) -> None:
    result = CliRunner().invoke(
        app, ["tune", str(save(tmp_path)), "-d", str(path), "--seconds", "0"]
    )
    assert result.exit_code == 0, result.output
    assert "0 kernels measured, 0 known before, 1 left" in result.stdout


def test_the_command_says_what_is_wrong(tmp_path: Path, path: Path) -> None:
    file = str(save(tmp_path))
    refused = CliRunner().invoke(app, ["tune", file, "-d", str(path), "--target", "rpi4"])
    assert refused.exit_code == 1
    assert "on the board" in refused.stderr
    missing = ["compile", file, "-o", str(tmp_path / "out"), "--tune", str(path)]
    result = CliRunner().invoke(app, missing)
    assert result.exit_code == 1
    assert "there is no tuning database" in result.stderr
    assert CliRunner().invoke(app, ["tune", file]).exit_code == 2
