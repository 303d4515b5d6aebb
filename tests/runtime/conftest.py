"""Builds shared by the runtime's tests: made once, read only."""

from __future__ import annotations

from pathlib import Path

import pytest
from runtime_programs import build_rows

from graphopt.backends.isa.avx512 import AVX512
from graphopt.backends.target import get_target
from graphopt.runtime.artifact import Artifact


@pytest.fixture(scope="package", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runners are cached for these tests only; the models' cache is left to the others."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def host_rows(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_rows(tmp_path_factory.mktemp("host") / "out", get_target("host"), threads=2)


@pytest.fixture(scope="session")
def plain_rows(host_rows: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """For this machine, too, but without AVX-512, which neither QEMU nor valgrind knows."""
    if get_target("host").isa is not AVX512:
        return host_rows
    return build_rows(tmp_path_factory.mktemp("plain") / "out", get_target("x86-64-v3"), threads=2)


@pytest.fixture(scope="session")
def arm_rows(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build_rows(tmp_path_factory.mktemp("arm") / "out", get_target("arm"), threads=2)
