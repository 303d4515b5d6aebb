"""The C interface: its errors, its memory, its threads, under valgrind and the sanitizers."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_programs import build_rows, output_of, rows_kernels, rows_program, tool

import graphopt.runtime
from graphopt.backends.target import get_target
from graphopt.runtime.artifact import RUNTIME_SOURCES, Artifact, write_sources

HERE = Path(__file__).parent
CSRC = Path(graphopt.runtime.__file__).parent / "csrc"
STRICT = ("-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic")


def compile_check(artifact: Artifact, source: str, output: Path, *flags: str) -> Path:
    gcc = tool("gcc", "gcc")
    output_of(gcc, *STRICT, "-O1", "-g", f"-I{artifact.folder}", *flags, HERE / source,
              artifact.archive, "-lpthread", "-o", output)  # fmt: skip
    return output


def test_every_wrong_call_has_its_status_and_message(host_rows: Artifact, tmp_path: Path) -> None:
    program = compile_check(host_rows, "check_api.c", tmp_path / "api")
    assert "api ok" in output_of(program)


@pytest.mark.parametrize("threads", ["1", "2", "7"])
def test_two_contexts_on_two_threads_agree_with_one(
    host_rows: Artifact, tmp_path: Path, threads: str
) -> None:
    program = compile_check(host_rows, "check_use.c", tmp_path / "use")
    assert "use ok" in output_of(program, "pair", threads, "300")


@pytest.mark.parametrize("threads", ["1", "3"])
def test_run_allocates_nothing(host_rows: Artifact, tmp_path: Path, threads: str) -> None:
    functions = ("malloc", "calloc", "realloc", "aligned_alloc")
    wraps = [f"-Wl,--wrap={function}" for function in functions]
    program = compile_check(host_rows, "check_use.c", tmp_path / "use", "-DCOUNT_ALLOCATIONS",
                            "-static", *wraps)  # fmt: skip
    text = output_of(program, "quiet", threads, "50")
    found = re.search(r"create allocated (\d+) times, run (\d+) times", text)
    assert found
    # The context and its arena; glibc's own allocations for threads are mmaps and callocs.
    assert int(found[1]) >= 2, "the count does not see the library's allocations"
    assert int(found[2]) == 0


@pytest.mark.parametrize("threads", ["1", "2"])
def test_a_thousand_contexts_leak_nothing(
    plain_rows: Artifact, tmp_path: Path, threads: str
) -> None:
    program = compile_check(plain_rows, "check_use.c", tmp_path / "use")
    valgrind = tool("valgrind", "valgrind")
    text = output_of(valgrind, "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=all",
                     program, "cycle", threads, "1000")  # fmt: skip
    assert "use ok" in text
    assert "in use at exit: 0 bytes" in text
    assert "ERROR SUMMARY: 0 errors" in text


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("sources")
    host = get_target("host")
    write_sources(rows_program(), host, rows_kernels(host), work, threads=2)
    return work


def fixed_addresses() -> tuple[str, ...]:
    """Some kernels randomize addresses too widely for TSan; some containers forbid to fix them."""
    prefix = (tool("setarch", "util-linux"), platform.machine(), "-R")
    return prefix if subprocess.run((*prefix, "true"), capture_output=True).returncode == 0 else ()


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sources: Path, tmp_path: Path, sanitizers: str) -> None:
    gcc = tool("gcc", "gcc")
    flags = (f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-O1", "-g")
    objects = []
    for source in ("rows_model.c", *RUNTIME_SOURCES):
        objects.append(tmp_path / f"{source}.o")
        output_of(gcc, *STRICT, *flags, "-DGRAPHOPT_PREFIX=rows", "-c", source, "-o", objects[-1],
                  cwd=sources)  # fmt: skip
    for check in ("check_use.c", "check_api.c"):
        program = tmp_path / check[:-2]
        output_of(gcc, *STRICT, *flags, f"-I{sources}", HERE / check, *objects,
                  sources / "rows_kernels.o", "-lpthread", "-o", program)  # fmt: skip
    fixed = fixed_addresses()
    assert "api ok" in output_of(*fixed, tmp_path / "check_api")
    for mode, threads, repeats in (("cycle", "3", "100"), ("pair", "3", "200"), ("pair", "5", "9")):
        assert "use ok" in output_of(*fixed, tmp_path / "check_use", mode, threads, repeats)


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
@pytest.mark.parametrize("level", ["-O0", "-O2"])
def test_no_compiler_warnings(sources: Path, tmp_path: Path, compiler: str, level: str) -> None:
    cc = tool(compiler, "gcc-aarch64-linux-gnu gcc")
    target = get_target("arm" if "aarch64" in compiler else "host")
    for source in write_sources(rows_program(), target, b"", tmp_path, threads=1):
        output_of(cc, *STRICT, "-Wshadow", "-Wconversion", "-Wno-sign-conversion", level,
                  "-DGRAPHOPT_PREFIX=rows", "-c", source, "-o", "x.o", cwd=tmp_path)  # fmt: skip
    output_of(cc, *STRICT, "-Wshadow", level, "-DGRAPHOPT_MODEL=rows",
              '-DGRAPHOPT_HEADER="rows.h"', f"-I{tmp_path}", "-c", CSRC / "runner.c",
              "-o", "x.o", cwd=tmp_path)  # fmt: skip


def test_header_is_cpp_too(host_rows: Artifact, tmp_path: Path) -> None:
    source = tmp_path / "use.cpp"
    source.write_text(
        '#include "rows.h"\n#include "rows.h"\n'
        "int main() { rows_context *c = nullptr; rows_options o{}; o.threads = 1;\n"
        "  if (rows_create(&c, &o) != ROWS_OK) return 1;\n"
        "  static_assert(ROWS_INPUT_X_BYTES == sizeof(rows_input_0_t) * ROWS_INPUT_X_ELEMENTS);\n"
        "  rows_destroy(c); return 0; }\n",
        encoding="utf-8",
    )
    gxx = tool("g++", "g++")
    for standard in ("-std=c++17", "-std=c++20"):
        flags = (standard, "-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{host_rows.folder}")
        output_of(gxx, *flags, source, host_rows.archive, "-o", tmp_path / "use")
        output_of(tmp_path / "use")


def test_two_models_link_into_one_program(host_rows: Artifact, tmp_path: Path) -> None:
    other = build_rows(tmp_path / "other", get_target("host"), name="other")
    source = tmp_path / "both.c"
    source.write_text(
        '#include "rows.h"\n#include "other.h"\n#include <stdio.h>\n'
        # The program's own symbols of the names that the kernels' object used inside.
        "int common_helper(void) { return 42; }\n"
        "int main(void) { rows_context *a; other_context *b;\n"
        "  if (rows_create(&a, NULL) || other_create(&b, NULL)) return 1;\n"
        "  if (common_helper() != 42) return 1;\n"
        '  printf("%s %s\\n", rows_get_info()->name, other_get_info()->name);\n'
        "  rows_destroy(a); other_destroy(b); return 0; }\n",
        encoding="utf-8",
    )
    output_of(tool("gcc", "gcc"), *STRICT, f"-I{host_rows.folder}", f"-I{other.folder}", source,
              host_rows.archive, other.archive, "-lpthread", "-o", tmp_path / "both")  # fmt: skip
    assert output_of(tmp_path / "both") == "rows other\n"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("pool") / "libpool.so"
    output_of(tool("gcc", "gcc"), *STRICT, "-O2", "-shared", "-fPIC", "-fvisibility=hidden",
              "-DGRAPHOPT_PREFIX=pool", f"-I{CSRC}", HERE / "pool_harness.c",
              CSRC / "graphopt_pool.c", "-lpthread", "-o", library)  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    loaded.cover.restype = ctypes.c_uint64
    return loaded


@settings(max_examples=150, deadline=None)
@given(
    threads=st.one_of(st.integers(1, 9), st.sampled_from([33, 64])),
    tasks=st.integers(0, 200),
    grain=st.one_of(st.integers(1, 250), st.just(2**31 - 1)),
    steps=st.integers(1, 8),
    slow=st.sampled_from([0, 0, 0, 1]),
)
def test_every_task_is_done_exactly_once(
    pool: ctypes.CDLL, threads: int, tasks: int, grain: int, steps: int, slow: int
) -> None:
    counts = (ctypes.c_int32 * max(1, tasks))()
    assert pool.cover(threads, tasks, grain, steps, slow, counts)
    assert list(counts)[:tasks] == [steps] * tasks


def test_workers_take_part(pool: ctypes.CDLL) -> None:
    counts = (ctypes.c_int32 * 64)()
    everybody_sleeps = 255
    assert pool.cover(3, 64, 1, 10, everybody_sleeps, counts) == 0b111
    assert set(counts) == {10}


def test_the_share_of_a_slow_worker_is_done_by_others(pool: ctypes.CDLL) -> None:
    counts = (ctypes.c_int32 * 64)()
    assert pool.cover(2, 64, 1, 20, 1, counts)
    assert set(counts) == {20}
    assert pool.share_of_the_slow() <= 20 * 64 // 4, "at most two of the eight chunks of a step"


def test_threads_come_back_to_their_tasks(pool: ctypes.CDLL) -> None:
    tasks, steps = 14, 20
    counts = (ctypes.c_int32 * tasks)()
    everybody_sleeps = 255
    assert pool.cover(2, tasks, 1, steps, everybody_sleeps, counts) == 0b11
    caller = [pool.share_of_the_caller(task) for task in range(tasks)]
    # Each begins with its share, and what others take is its end: a worker that is late by less
    # than seven chunks still finds the first one.
    assert caller[0] == steps
    assert caller[7] <= steps // 4


def test_few_tasks_stay_on_the_caller(pool: ctypes.CDLL) -> None:
    counts = (ctypes.c_int32 * 64)()
    assert pool.cover(4, 64, 64, 50, 0, counts) == 1


def test_pool_is_clean_under_the_thread_sanitizer(tmp_path: Path) -> None:
    program = tmp_path / "pool"
    output_of(tool("gcc", "gcc"), *STRICT, "-O1", "-g", "-fsanitize=thread", "-DHARNESS_MAIN",
              "-DGRAPHOPT_PREFIX=pool", f"-I{CSRC}", HERE / "pool_harness.c",
              CSRC / "graphopt_pool.c", "-lpthread", "-o", program)  # fmt: skip
    output_of(*fixed_addresses(), program)
