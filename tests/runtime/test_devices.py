"""Running artifacts here and under the emulator, and refusing a CPU that lacks an instruction."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runtime_programs import build_rows, output_of, rows_inputs, rows_reference, tool

import graphopt.runtime
from graphopt.backends.cpu_features import PROBES
from graphopt.backends.emit_c import _features
from graphopt.backends.target import cpu_flags, get_target, has_features
from graphopt.backends.toolchain import find_toolchain
from graphopt.errors import ArtifactError, TargetError
from graphopt.runtime.artifact import Artifact
from graphopt.runtime.devices import (
    Device,
    EmulatorDevice,
    LocalDevice,
    build_runner,
    find_emulator,
)
from graphopt.runtime.load import EmulatedModel, load


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_devices_give_the_reference(
    host_rows: Artifact, plain_rows: Artifact, arm_rows: Artifact, threads: int | None
) -> None:
    inputs = rows_inputs(3)
    expected = rows_reference(*inputs)
    pairs: list[tuple[Device, Artifact]] = [
        (LocalDevice(), host_rows), (EmulatorDevice(), plain_rows), (EmulatorDevice(), arm_rows)
    ]  # fmt: skip
    for device, artifact in pairs:
        outputs = device.run(artifact.folder, inputs, threads=threads)
        for one, other in zip(outputs, expected, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            np.testing.assert_array_equal(one, other)
        seconds = device.time(artifact.folder, inputs, repeats=4, warmup=2, threads=threads)
        assert len(seconds) == 4
        assert min(seconds) > 0


def test_load_takes_the_emulator_for_another_cpu(arm_rows: Artifact) -> None:
    with load(arm_rows.folder, 2) as model:
        assert isinstance(model, EmulatedModel)
        inputs = rows_inputs(4)
        got = model(*inputs)
        for one, other in zip(got, rows_reference(*inputs), strict=True):
            np.testing.assert_array_equal(one, other)
        assert len(model.time(2)) == 2
        with pytest.raises(TargetError, match="on the board"):
            model.profile()
    with pytest.raises(ArtifactError, match="closed"):
        model(*inputs)


@pytest.mark.parametrize(
    ("target", "cpu", "missing"),
    [
        ("x86-64-v3", "Nehalem", ["avx2", "fma", "bmi2"]),
        ("x86-64-v4", "Nehalem", ["avx512f", "avx2"]),
        ("x86-64-v2", "core2duo", ["sse4.2", "popcnt"]),
        ("cortex-a76", "cortex-a53", ["dotprod", "fullfp16", "lse"]),
    ],
)
def test_a_cpu_that_lacks_an_instruction_is_refused_by_name(
    tmp_path: Path, target: str, cpu: str, missing: list[str]
) -> None:
    artifact = build_rows(tmp_path / "out", get_target(target))
    with pytest.raises(ArtifactError, match=f"built for {target}, but this CPU lacks") as caught:
        EmulatorDevice(cpu).run(artifact.folder, rows_inputs())
    lacks = str(caught.value).split("lacks ")[1].split(", ")
    assert set(missing) <= set(lacks)
    assert "sse3" not in lacks, "what the CPU has must not be named"
    assert "neon" not in lacks


@pytest.mark.parametrize(
    ("target", "cpu"),
    [("x86-64-v2", "Nehalem"), ("x86-64-v3", "max"), ("cortex-a53", "cortex-a53"),
     ("rpi4", "cortex-a72"), ("cortex-a76", "cortex-a76"), ("rpi5", "max")],
)  # fmt: skip
def test_a_cpu_that_has_all_is_accepted(tmp_path: Path, target: str, cpu: str) -> None:
    artifact = build_rows(tmp_path / "out", get_target(target))
    inputs = rows_inputs()
    got = EmulatorDevice(cpu).run(artifact.folder, inputs)
    np.testing.assert_array_equal(got[0], rows_reference(*inputs)[0])


def test_an_unfit_build_is_refused_where_the_loader_runs_it(tmp_path: Path) -> None:
    host = get_target("host")
    flags = llvm_names(cpu_flags())
    lacking = tuple(f for f in PROBES[host.arch] if not has_features((f,), flags))
    assert lacking, "no CPU has them all"
    artifact = build_rows(tmp_path / "out", replace(host, features=lacking[:3]))
    with pytest.raises(ArtifactError, match=f"lacks {', '.join(lacking[:3])}"):
        load(artifact.folder)


def llvm_names(flags: frozenset[str]) -> frozenset[str]:
    """The flags, and LLVM's spelling of those that `has_features` does not know."""
    names = flags | {flag.replace("_", "") for flag in flags}
    return names | ({"pclmul"} if "pclmulqdq" in flags else set())


@pytest.mark.parametrize("arch", ["x86_64", "aarch64"])
def test_every_probe_compiles_and_agrees_with_the_kernel(tmp_path: Path, arch: str) -> None:
    target = get_target("x86-64-v2" if arch == "x86_64" else "arm")
    table = _features(replace(target, features=tuple(PROBES[arch])))
    (tmp_path / "probe.c").write_text(
        f'#include "graphopt_runtime.h"\n#include <stdio.h>\n{table}'
        "const graphopt_model_data graphopt_model = {.features = features, .feature_count ="
        " sizeof features / sizeof *features};\n"
        "int main(void) { static char text[2000]; graphopt_cpu_missing(text, sizeof text);"
        " puts(text); return 0; }\n",
        encoding="utf-8",
    )
    csrc = Path(graphopt.runtime.__file__).parent / "csrc"
    find_toolchain(target).link_program(
        ["probe.c", str(csrc / "graphopt_cpu.c")], "probe", cwd=tmp_path,
        flags=("-DGRAPHOPT_PREFIX=probe", f"-I{csrc}"),
    )  # fmt: skip
    if arch == platform.machine():
        missing = set(output_of(tmp_path / "probe").strip().split(", ")) - {""}
        flags = llvm_names(cpu_flags())
        assert missing == {f for f in PROBES[arch] if not has_features((f,), flags)}
    emulator = find_emulator(arch)
    cpu = {"x86_64": "max", "aarch64": "cortex-a76"}[arch]
    missing = set(output_of(emulator, "-cpu", cpu, tmp_path / "probe").strip().split(", "))
    present = {"x86_64": {"avx2", "fma", "bmi2", "sse4.2", "lzcnt", "sahf", "aes"},
               "aarch64": {"neon", "crc", "lse", "rdm", "fullfp16", "dotprod", "rcpc"}}  # fmt: skip
    absent = {"x86_64": {"avx512f", "avxvnni", "avx512fp16"},
              "aarch64": {"sve", "sve2", "i8mm", "bf16", "fp16fml"}}  # fmt: skip
    assert absent[arch] <= missing
    assert not present[arch] & missing


def test_the_shared_library_opens_under_the_emulator(arm_rows: Artifact, tmp_path: Path) -> None:
    source = tmp_path / "open.c"
    source.write_text(
        '#include "rows.h"\n#include <dlfcn.h>\n#include <stdio.h>\n'
        "int main(int argc, char **argv) {\n"
        "  void *lib = dlopen(argv[argc - 1], RTLD_NOW | RTLD_LOCAL); rows_context *c;\n"
        "  if (!lib) { puts(dlerror()); return 1; }\n"
        "  rows_status (*create)(rows_context **, const rows_options *);\n"
        "  void (*destroy)(rows_context *);\n"
        '  *(void **)&create = dlsym(lib, "rows_create");\n'
        '  *(void **)&destroy = dlsym(lib, "rows_destroy");\n'
        "  rows_options options = {3, 0, 0};\n"
        "  for (int i = 0; i < 20; i++) {\n"
        "    if (create(&c, &options)) return 2;\n"
        "    destroy(c);\n"
        "  }\n"
        '  dlclose(lib); puts("opened"); return 0; }\n',
        encoding="utf-8",
    )
    gcc = tool("aarch64-linux-gnu-gcc", "gcc-aarch64-linux-gnu")
    program = tmp_path / "open"
    output_of(gcc, f"-I{arm_rows.folder}", source, "-ldl", "-o", program)
    text = output_of(find_emulator("aarch64"), "-L", "/usr/aarch64-linux-gnu", program,
                     arm_rows.library)  # fmt: skip
    assert "opened" in text


def test_the_runner_is_built_once_and_checks_its_input(host_rows: Artifact, cache: Path) -> None:
    runner = build_runner(host_rows.folder)
    assert runner.is_relative_to(cache)
    stamp = runner.stat().st_mtime_ns
    assert build_runner(host_rows.folder) == runner
    assert runner.stat().st_mtime_ns == stamp
    assert [path.name for path in runner.parent.iterdir()] == ["run_rows"]
    assert "input row.ids int64 4\n" in output_of(runner, "--info")
    data = b"".join(array.tobytes() for array in rows_inputs())
    for given, options, status, words in (
        (data[:-1], (), 3, b"ends inside input row.ids"),
        (data + b"x", (), 3, b"longer than the inputs"),
        (data, ("--threads",), 2, b"usage"),
        (data, ("--repeat", "-1"), 2, b"usage"),
        (data, ("--threads", "500"), 11, b"500 threads"),
    ):
        result = subprocess.run([runner, *options], input=given, capture_output=True)
        assert result.returncode == status
        assert words in result.stderr


def test_missing_tools_and_wrong_places_are_named(
    arm_rows: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match="built for aarch64"):
        LocalDevice().run(arm_rows.folder, rows_inputs())
    with pytest.raises(ArtifactError, match="not a folder"):
        EmulatorDevice().run(tmp_path / "nowhere", rows_inputs())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TargetError, match="apt install qemu-user"):
        EmulatorDevice().run(arm_rows.folder, rows_inputs())
