"""Which compiler is taken, and what is said when there is none or it fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.backends import cpu_features, toolchain
from graphopt.backends.target import get_target, targets
from graphopt.backends.toolchain import find_toolchain
from graphopt.errors import ToolchainError

ARM = get_target("arm")


def fake_compiler(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text(f'#!/bin/sh\n[ "$1" = -h ] && exit 1\necho "{name} 1.0"\n', encoding="utf-8")
    path.chmod(0o755)
    return path


@pytest.fixture
def no_zig(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_order_explicit_environment_system_zig(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = fake_compiler(tmp_path, "aarch64-linux-gnu-gcc")
    named = fake_compiler(tmp_path, "named-cc")
    explicit = fake_compiler(tmp_path, "explicit-cc")
    both = {"PATH": str(tmp_path), "GRAPHOPT_CC_AARCH64": f"'{named}' -v1"}
    assert find_toolchain(ARM, str(explicit), environment=both).command == (str(explicit),)
    assert find_toolchain(ARM, [str(explicit), "-x"], environment=both).command[1] == "-x"
    assert find_toolchain(ARM, environment=both).command == (str(named), "-v1")
    found = find_toolchain(ARM, environment={"PATH": str(tmp_path)})
    assert found.command == (str(system),)
    assert found.version == "aarch64-linux-gnu-gcc 1.0"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(toolchain, "_run", lambda command, cwd=None: "0.99\n")
    zig = find_toolchain(ARM, environment={"PATH": ""})
    assert zig.command == (sys.executable, "-m", "ziglang", "cc")
    assert zig.version == "zig 0.99"
    assert zig.static == ("-target", "aarch64-linux-musl")
    assert find_toolchain(ARM, "python3 -m ziglang cc", environment={}).shared == zig.shared


@pytest.mark.usefixtures("no_zig")
def test_without_a_compiler_the_error_says_what_to_install() -> None:
    with pytest.raises(ToolchainError) as caught:
        find_toolchain(ARM, environment={"PATH": ""})
    text = str(caught.value)
    for words in ("no C compiler for arm", "apt install gcc-aarch64-linux-gnu",
                  "pip install graphopt[cross]", "GRAPHOPT_CC_AARCH64"):  # fmt: skip
        assert words in text
    with pytest.raises(ToolchainError, match=r"apt install gcc`"):
        find_toolchain(get_target("host"), environment={"PATH": ""})


def test_a_named_compiler_that_is_not_there_or_fails(tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="No such file"):
        find_toolchain(ARM, "/nowhere/cc")
    (tmp_path / "bad.c").write_text("int main(void) { return nonsense; }\n")
    with pytest.raises(ToolchainError, match=r"(?s)\$ .*bad\.c.*nonsense"):
        find_toolchain(get_target("host")).compile("bad.c", "bad.o", cwd=tmp_path)


def test_a_compiler_for_another_cpu_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "x.c").write_text("int x;\n")
    arm: Any = find_toolchain(ARM)
    wrong = toolchain.Toolchain(arm.command, "x86_64", (), (), (), arm.version)
    with pytest.raises(ToolchainError, match="makes code for aarch64, not for x86_64"):
        wrong.compile("x.c", "x.o", cwd=tmp_path)


def test_every_target_can_be_checked_for() -> None:
    for target in targets().values():
        assert len(cpu_features.probes(target.arch, target.features)) == len(target.features)
