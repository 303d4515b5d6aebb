"""The Python loader, inside graphopt and as the file that ships with a model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from runtime_programs import build_rows, compile_kernels, rows_inputs, rows_reference

from graphopt.backends.target import get_target
from graphopt.errors import ArtifactError, GraphoptError, InputError
from graphopt.program.ir import Buffer, Kernel, Program, Step
from graphopt.runtime.artifact import Artifact, build_artifact
from graphopt.runtime.load import load
from graphopt.runtime.loader import Model


def assert_same(got: object, expected: tuple[np.ndarray, ...]) -> None:
    assert isinstance(got, tuple)
    for one, other in zip(got, expected, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("threads", [None, 1, 2, 3, 16, 128])
def test_same_result_on_any_number_of_threads(host_rows: Artifact, threads: int | None) -> None:
    with load(host_rows.folder, threads) as model:
        for seed in range(20):
            inputs = rows_inputs(seed)
            assert_same(model(*inputs), rows_reference(*inputs))


def test_inputs_by_name_and_in_any_memory_order(host_rows: Artifact) -> None:
    x, ids = rows_inputs()
    expected = rows_reference(x, ids)
    with load(host_rows.folder) as model:
        assert_same(model(x, **{"row.ids": ids}), expected)
        assert_same(model(**{"row.ids": ids, "x": np.asfortranarray(x)}), expected)
        wide = np.zeros((x.shape[0], 2 * x.shape[1]), x.dtype)
        wide[:, ::2] = x
        assert_same(model(wide[:, ::2], ids), expected)
        unaligned = np.frombuffer(b"\0" + ids.tobytes(), np.uint8)[1:].view(np.int64)
        assert_same(model(x, unaligned), expected)
        x.flags.writeable = ids.flags.writeable = False
        assert_same(model(x, ids), expected)


def test_wrong_inputs_are_refused_with_what_is_wrong(host_rows: Artifact) -> None:
    x, ids = rows_inputs()
    wrong: list[tuple[tuple[object, ...], dict[str, object], str]] = [
        ((x,), {}, r"'row\.ids' is missing; rows takes x float32\[13, 32\], row\.ids int64\[4\]"),
        ((x, ids, ids), {}, "3 inputs given"),
        ((x, ids), {"x": x}, "'x' is given twice"),
        ((x,), {"rowids": ids}, "no input 'rowids'"),
        ((x[:12], ids), {}, r"shape \[12, 32\]; the model was compiled for \[13, 32\]"),
        ((x.astype(np.float64), ids), {}, r"float64; the model takes float32 .*astype"),
        ((x.astype(">f4"), ids), {}, "takes float32"),
        ((x.tolist(), ids), {}, "is a list; pass a numpy array"),
    ]
    with load(host_rows.folder) as model, Model(host_rows.folder) as plain:
        for args, named, words in wrong:
            with pytest.raises(InputError, match=words):
                model(*args, **named)
            with pytest.raises(ValueError, match=words):
                plain(*args, **named)


def test_many_threads_share_one_model(host_rows: Artifact) -> None:
    with load(host_rows.folder, 2) as model, ThreadPoolExecutor(8) as callers:
        jobs = [
            (rows_inputs(seed), callers.submit(model, *rows_inputs(seed))) for seed in range(99)
        ]
        for inputs, job in jobs:
            assert_same(job.result(), rows_reference(*inputs))


def sleepy_program() -> Program:
    out = Buffer("y", (1,), "int8", "plain", "output", 1)
    step = Step(Kernel("sleep", None, "written in C"), ("y",), (), ("y",), 1)
    return Program("sleepy", (step,), {"y": out}, (), ("y",), 0, 0, 0)


_SLEEP = """
#include <stdint.h>
#include <time.h>
struct timespec; int nanosleep(const struct timespec *, struct timespec *);
void sleepy_k_sleep(int8_t *y, int32_t begin, int32_t end) {
    struct timespec time = {0, 400000000};
    nanosleep(&time, 0);
    *y = (int8_t)(end - begin);
}
"""


def test_a_context_in_use_says_busy_and_the_model_takes_turns(tmp_path: Path) -> None:
    # No inputs, no weights, no arena, one output that comes bare.
    host = get_target("host")
    kernels = compile_kernels(_SLEEP, host)
    artifact = build_artifact(sleepy_program(), host, kernels, tmp_path / "out")
    with load(artifact.folder) as model:
        running = threading.Thread(target=model)
        running.start()
        threading.Event().wait(0.15)
        with pytest.raises(ArtifactError, match="in use by another thread"):
            model._run(())
        np.testing.assert_array_equal(model(), np.array([1], np.int8))
        running.join()


def test_time_and_profile(host_rows: Artifact) -> None:
    with load(host_rows.folder) as model:
        seconds = model.time(5, *rows_inputs())
        assert len(seconds) == 5
        assert all(0 < second < 1 for second in seconds)
        assert len(model.time(3)) == 3
        profile = model.profile(repeats=3)
        assert [kernel for kernel, _ in profile] == ["scale", "cumulate", "pick", "total"]
        assert 0 < sum(second for _, second in profile) < 1


def test_a_closed_model_and_a_broken_folder_say_so(host_rows: Artifact, tmp_path: Path) -> None:
    model = load(host_rows.folder)
    model.close()
    model.close()
    with pytest.raises(ArtifactError, match="closed"):
        model(*rows_inputs())
    with pytest.raises(ArtifactError, match="not a folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="0 manifests"):
        load(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(host_rows.folder, folder)
    (folder / "librows.so").write_bytes(b"rubbish")
    with pytest.raises(ArtifactError, match="cannot load"):
        load(folder)
    (folder / "librows.so").unlink()
    with pytest.raises(ArtifactError, match="cannot load"):
        load(folder)
    manifest = json.loads((folder / "rows.json").read_text())
    (folder / "rows.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ArtifactError, match="version 99"):
        load(folder)
    (folder / "rows.json").write_text("{")
    with pytest.raises(GraphoptError, match="0 manifests"):
        load(folder)
    with pytest.raises(ArtifactError, match="129 threads"):
        load(host_rows.folder, 129)


def test_a_new_build_at_the_same_place_is_what_gets_loaded(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    host = get_target("host")
    build_rows(folder, host, threads=1)
    old = load(folder)
    build_rows(folder, host, threads=2)
    with load(folder) as new:
        assert new.threads == 2
        assert old._library.rows_arena_size(0) == 3328 + 128
        assert new._library.rows_arena_size(0) == 3328 + 2 * 128
    old.close()


_STANDALONE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy, rows
with rows.Model() as model:
    x, ids = numpy.load(sys.argv[2]).values()
    numpy.savez(sys.argv[3], *model(x, ids))
try:
    model(x)
except rows.InputError as error:
    assert isinstance(error, ValueError)
heavy = {"torch", "tvm", "graphopt", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""


def test_the_folder_works_alone_and_anywhere(host_rows: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "on the board"
    shutil.copytree(host_rows.folder, folder)
    inputs = rows_inputs(5)
    given, made = tmp_path / "in.npz", tmp_path / "out.npz"
    np.savez(given, *inputs)
    command = [sys.executable, "-I", "-c", _STANDALONE, folder, given, made]
    subprocess.run(command, check=True, cwd=tmp_path)
    with np.load(made) as results:
        assert_same(tuple(results.values()), rows_reference(*inputs))


def test_loading_through_graphopt_imports_neither_torch_nor_tvm(host_rows: Artifact) -> None:
    code = (
        "import sys; from graphopt.runtime.load import load\n"
        f"load({str(host_rows.folder)!r}).close()\n"
        "assert not {'torch', 'tvm', 'onnx'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_standalone_loader_refuses_another_cpu(arm_rows: Artifact) -> None:
    with pytest.raises(RuntimeError, match=r"built for arm \(aarch64\); this machine is"):
        Model(arm_rows.folder)
