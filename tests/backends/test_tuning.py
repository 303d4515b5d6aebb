"""Tuning databases: files, merging, keys, and that lowering takes what they name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Builder
from torch import fx

import graphopt
from graphopt.backends import tuning
from graphopt.backends.codegen import compile_kernels
from graphopt.backends.kernels.base import Alternatives
from graphopt.backends.lower import lower
from graphopt.backends.lower_alone import TunableKernel, lower_alone, tunable_kernels
from graphopt.backends.target import get_target
from graphopt.backends.tuning import Entry, TuningDatabase, find_database, key_of
from graphopt.errors import TuningError
from graphopt.runtime.artifact import build_artifact
from graphopt.runtime.load import load

aten = torch.ops.aten
ENTRY = Entry("conv_direct 16×5", 0.9, "conv_direct 16×6", 1.0, "a board", 1)
TOLERANCE = 5e-6
"""Of the largest output; Winograd's rounding has about 2e-6."""


def graph(channels: int = 64, size: int = 12, relu: bool = True) -> tuple[fx.GraphModule, Builder]:
    """A pointwise convolution, a 3×3 between blocks, and one that makes the output."""
    b = Builder()
    x = b.conv(b.input(b.random(1, 8, size, size)), channels, (1, 1))
    x = b.conv(x, channels, (3, 3), padding=1)
    if relu:
        x = b.op(aten.relu.default, x)
    b.returns(b.conv(x, 8, (1, 1)))
    return b.finish(), b


def kernels(target: str = "x86-64-v3", **options: int | bool) -> list[TunableKernel]:
    return tunable_kernels(graph(**options)[0], get_target(target))


def three_by_three(target: str = "x86-64-v3", **options: int | bool) -> Alternatives:
    (found,) = (
        each.alternatives
        for each in kernels(target, **options)
        if "kernel=3x3" in each.alternatives.key
    )
    return found


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tuned.json"
    database = TuningDatabase({"b": ENTRY, "a": replace(ENTRY, choice="winograd F(4×4,3×3) 16×6")})
    database.save(path)
    again = TuningDatabase.load(path)
    assert {key: again[key] for key in again} == {key: database[key] for key in database}
    assert [each.name for each in path.parent.iterdir()] == ["tuned.json"]
    first = path.read_bytes()
    TuningDatabase({"a": database["a"], "b": ENTRY}).save(path)
    assert path.read_bytes() == first


def test_merging_keeps_the_larger_gain() -> None:
    ours = TuningDatabase({"same": ENTRY, "better": ENTRY, "worse": ENTRY})
    # Slower in seconds, as another board is, but with a larger gain over its own default.
    better = replace(ENTRY, choice="other", seconds=5.0, default_seconds=9.0)
    worse = replace(ENTRY, choice="other", seconds=0.1, default_seconds=0.1)
    same = replace(ENTRY, device="another")
    ours.merge(TuningDatabase({"same": same, "better": better, "worse": worse, "new": ENTRY}))
    assert len(ours) == 4
    assert ours["same"] == ours["worse"] == ours["new"] == ENTRY
    assert ours["better"] == better


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a tuning database"),
        ("[1]", "not a tuning database"),
        ('{"format": "other"}', "not a tuning database"),
        ('{"format": "graphopt tuning", "schema": 99, "entries": {}}', "schema 99"),
        ('{"format": "graphopt tuning", "schema": 1}', "no entries"),
        (
            '{"format": "graphopt tuning", "schema": 1, "entries": {"k": {}}}',
            "k should have choice",
        ),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "tuned.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TuningError, match=message) as error:
        TuningDatabase.load(path)
    assert str(path) in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    ("field", "value"),
    [("seconds", 0), ("seconds", "1"), ("threads", 1.5), ("threads", True), ("choice", None),
     ("default_seconds", float("inf"))],
)  # fmt: skip
def test_bad_entries_are_refused(tmp_path: Path, field: str, value: object) -> None:
    path = tmp_path / "tuned.json"
    TuningDatabase({"k": ENTRY}).save(path)
    data = json.loads(path.read_text("utf-8"))
    data["entries"]["k"][field] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(TuningError, match=f"k: {field}"):
        TuningDatabase.load(path)


def test_missing_files_and_places_are_errors(tmp_path: Path) -> None:
    with pytest.raises(TuningError, match="there is no tuning database"):
        find_database(tmp_path / "none.json")
    with pytest.raises(TuningError, match="cannot read"):
        TuningDatabase.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(TuningError, match="cannot write"):
        TuningDatabase().save(tmp_path / "file" / "tuned.json")


def test_the_key_is_all_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    target = get_target("x86-64-v3")
    plain = key_of(three_by_three(), target)
    assert key_of(three_by_three(), target) == plain
    # Boards with one CPU share entries.
    assert key_of(three_by_three(), replace(target, name="board")) == plain
    others = [
        key_of(three_by_three(channels=48), target),
        key_of(three_by_three(size=13), target),
        key_of(three_by_three(), get_target("x86-64-v4")),
        key_of(three_by_three(), replace(target, mcpu="znver3")),
        key_of(three_by_three(), replace(target, l2_bytes=1 << 20)),
        key_of(three_by_three(), replace(target, cores=1)),
    ]
    monkeypatch.setattr(tuning, "GENERATOR_VERSION", 99)
    others.append(key_of(three_by_three(), target))
    assert len({plain, *others}) == 8


def test_the_key_knows_layouts_and_epilogues() -> None:
    def key(*build: object) -> str:
        b = Builder()
        x = b.conv(b.input(b.random(1, 8, 6, 6)), 16, (1, 1))
        for op in build:
            x = b.op(op, x)
        b.returns(x)
        (found,) = tunable_kernels(b.finish(), get_target("x86-64-v3"))
        return found.alternatives.key

    assert key().endswith("plain plain light")
    assert key(aten.relu.default) == key()
    assert key(*[aten.relu.default] * 7).endswith("heavy")


def test_every_way_is_offered_once() -> None:
    for target in ("x86-64-v3", "rpi4"):
        names = [each.name for each in three_by_three(target).candidates]
        assert len(set(names)) == len(names)
        assert {name.split()[0] for name in names} == {"winograd", "conv_direct"}
        assert sum(name.startswith("winograd") for name in names) == 3
        assert all(each.cycles > 0 for each in three_by_three(target).candidates)


@pytest.mark.parametrize("algorithm", ["winograd", "strassen"])
def test_what_is_not_wanted_is_no_candidate(algorithm: str) -> None:
    b = Builder()
    x = b.conv(b.input(b.random(1, 8, 12, 12)), 64, (1, 1))
    b.returns(b.conv(b.conv(b.conv(x, 64, (1, 1)), 64, (3, 3)), 8, (1, 1)))
    gm = b.finish()

    def is_candidate(**options: bool) -> bool:
        seen: list[Alternatives] = []
        lower(gm, get_target("x86-64-v3"), "m", **options, choice=lambda a: seen.append(a))
        return any(algorithm in c.name for each in seen for c in each.candidates)

    assert is_candidate()
    assert not is_candidate(**{algorithm: False})


@pytest.mark.parametrize("threads", [1, 2])
def test_every_candidate_computes_the_same(tmp_path: Path, threads: int) -> None:
    gm, builder = graph()
    target = get_target("host")
    with torch.no_grad():
        (expected,) = gm(*builder.inputs)
    key = three_by_three("host").key
    for number, candidate in enumerate(three_by_three("host").candidates):

        def choice(each: Alternatives, name: str = candidate.name) -> str | None:
            return name if each.key == key else None

        program = lower(gm, target, "m", choice=choice)
        origins = [step.kernel.origin for step in program.steps]
        assert origins[1] == f"{candidate.name} (tuned)"
        assert not any("tuned" in origin for origin in (origins[0], *origins[2:]))
        folder = tmp_path / str(number)
        build_artifact(program, target, compile_kernels(program, target), folder)
        with load(folder, threads) as model:
            actual = model(*(x.numpy() for x in builder.inputs))
        error = np.abs(actual - expected.numpy()).max() / np.abs(expected.numpy()).max()
        assert error <= TOLERANCE, candidate.name


def model() -> tuple[torch.nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Conv2d(8, 32, 1), torch.nn.Conv2d(32, 16, 3, padding=1), torch.nn.Flatten(),
        torch.nn.Linear(16 * 36, 5),
    )  # fmt: skip
    return layers.eval(), torch.randn(1, 8, 6, 6)


def generators(compiled: graphopt.Compiled) -> list[str]:
    return [each["generator"] for each in compiled.report.as_dict()["kernels"]]


def test_compile_takes_what_is_stored(tmp_path: Path) -> None:
    module, x = model()
    target = get_target("host")
    asked: list[Alternatives] = []

    default = graphopt.compile(module, x, tune=TuningDatabase())
    lower(default.graph, target, "m", choice=lambda each: asked.append(each))
    others = [each.candidates[-1].name for each in asked]
    assert others != [each.candidates[0].name for each in asked]
    database = TuningDatabase(
        {
            key_of(each, target): replace(ENTRY, choice=name)
            for each, name in zip(asked, others, strict=True)
        }
    )
    database.save(tmp_path / "tuned.json")
    compiled = graphopt.compile(module, x, tune=tmp_path / "tuned.json")
    assert generators(compiled) == [f"{name} (tuned)" for name in others]
    manifest = compiled.export(tmp_path / "out").manifest
    assert [step["generator"] for step in manifest["steps"]] == generators(compiled)
    with torch.no_grad():
        expected = module(x)
    assert (compiled(x) - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_stale_choices_are_ignored() -> None:
    module, x = model()
    target = get_target("host")
    asked: list[Alternatives] = []
    default = graphopt.compile(module, x, tune=TuningDatabase())
    lower(default.graph, target, "m", choice=lambda each: asked.append(each))
    entries = {key_of(each, target): replace(ENTRY, choice="conv_direct 9×99") for each in asked}
    stale = graphopt.compile(module, x, tune=TuningDatabase(entries))
    assert generators(stale) == generators(default)


def test_given_entries_go_before_shipped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = TuningDatabase({"both": replace(ENTRY, seconds=0.1), "shipped": ENTRY})
    monkeypatch.setattr(tuning, "shipped", lambda: theirs)
    found = find_database(TuningDatabase({"both": ENTRY}))
    assert found["both"] == found["shipped"] == ENTRY
    assert find_database(None) is theirs
    assert theirs["both"] != ENTRY


def test_what_is_shipped_can_be_read() -> None:
    assert all(entry.gain >= 1 for entry in map(tuning.shipped().__getitem__, tuning.shipped()))


def test_kernels_alone_compute_what_they_do_in_the_model(tmp_path: Path) -> None:
    b = Builder()
    source, residual = b.input(b.random(2, 16, 5, 7)), b.input(b.random(2, 24, 5, 7))
    y = b.op(aten.add.Tensor, b.conv(source, 24, (3, 3), padding=1), residual)
    b.returns(y)
    gm, target = b.finish(), get_target("host")
    (kernel,) = tunable_kernels(gm, target)
    assert kernel.uses == 1
    with torch.no_grad():
        (expected,) = gm(*b.inputs)
    for number, candidate in enumerate(kernel.alternatives.candidates):
        program = lower_alone(kernel, target, candidate.name)
        # Once per copy of the weights; each of them has its own.
        assert len({step.args for step in program.steps}) == len(program.steps) > 1
        assert program.weights >= target.l2_bytes or len(program.steps) == 16
        folder = tmp_path / str(number)
        build_artifact(program, target, compile_kernels(program, target), folder)
        arrays = {x.size: x for x in (x.numpy().ravel() for x in b.inputs)}
        with load(folder) as alone:
            actual = alone(*(arrays[tensor.nbytes // 4] for tensor in alone.inputs))
        wanted = expected.numpy().ravel()
        assert np.abs(actual - wanted).max() <= TOLERANCE * np.abs(wanted).max()


def test_equal_kernels_are_measured_once_and_long_ones_first() -> None:
    b = Builder()
    x = b.input(b.random(1, 8, 6, 6))
    for _ in range(3):
        x = b.op(aten.relu.default, b.conv(x, 8, (1, 1)))
    x = b.conv(x, 64, (3, 3), padding=1)
    b.returns(b.conv(x, 64, (3, 3), padding=1))
    found = tunable_kernels(b.finish(), get_target("x86-64-v3"))
    assert [each.cycles for each in found] == sorted((each.cycles for each in found), reverse=True)
    assert sum(each.uses for each in found) == 5
    assert len(found) < 5
