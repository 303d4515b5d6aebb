"""What is shipped, what importing it costs, and which way imports point."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet")

PACKAGES = {"graphopt": "graphopt", "graphopt.passes": "passes", "graphopt.backends": "backends"}

# Each part may import those before it, and itself; a name that is not listed belongs to the parent.
ORDER = (
    ("graphopt.errors",),
    ("graphopt.graph", "graphopt.windows", "graphopt.runtime.staging", "graphopt.runtime.loader"),
    ("graphopt.ops",),
    ("graphopt.importers",),
    ("graphopt.program",),
    ("graphopt.passes",),
    ("graphopt.backends",),
    ("graphopt.runtime",),
    ("graphopt.report",),
    ("graphopt.compiler",),
    ("graphopt",),
    ("graphopt.cli_inputs", "graphopt.cli_output", "graphopt.cli_tune", "graphopt.cli"),
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy, so that no `build/` folder is left in the repository."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in PACKAGES.values():
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = (*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir")
    subprocess.run([*command, target, source], check=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [*PIP, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True
    )
    return site


def python(code: str, site: Path | None = None, cwd: Path | None = None) -> str:
    """What a fresh Python prints; with `site`, only what is installed there is graphopt."""
    paths = [] if site is None else [str(site)]
    setup = f"import sys; sys.path[:0] = {paths}\n"
    if site is not None:
        # The editable install's hook would find what the wheel lacks.
        setup += "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in str(f)]\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + code], capture_output=True, text=True, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_everything_under_one_name(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"graphopt"}
    expected = {"graphopt/py.typed"}
    for package, folder in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".c", ".h"):
                inside = path.relative_to(ROOT / folder).as_posix()
                expected.add(f"{package.replace('.', '/')}/{inside}")
    assert expected <= set(names)
    assert "graphopt/runtime/csrc/graphopt_runtime.c" in expected


def test_installed_wheel_compiles_a_model(installed: Path, tmp_path: Path) -> None:
    code = (
        "import torch, graphopt, graphopt.passes, graphopt.backends\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "model = torch.nn.Conv2d(3, 8, 3).eval()\n"
        "graphopt.compile(model, x).export('out')\n"
        "y = graphopt.load('out')(x.numpy())\n"
        "assert abs(model(x).detach().numpy() - y).max() < 1e-5\n"
        "for module in (graphopt, graphopt.passes, graphopt.backends): print(module.__file__)\n"
    )
    for file in python(code, installed, tmp_path).splitlines():
        assert Path(file).is_relative_to(installed)


def test_no_top_level_passes(installed: Path, tmp_path: Path) -> None:
    code = "import importlib.util as u; print(u.find_spec('passes'), u.find_spec('backends'))"
    assert python(code, installed, tmp_path) == "None None"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("graphopt", "torch tvm onnx onnx_graphsurgeon numpy graphopt.backends graphopt.passes"),
        ("graphopt.cli", "torch tvm onnx numpy"),
        ("graphopt.runtime.loader", "torch tvm onnx platformdirs"),
        ("graphopt.ops", "graphopt.passes graphopt.backends"),
        ("graphopt.importers", "tvm graphopt.passes graphopt.backends"),
        ("graphopt.passes", "tvm graphopt.backends graphopt.compiler"),
        ("graphopt.backends", "torch graphopt.compiler"),
    ],
)
def test_importing_stays_light(module: str, absent: str) -> None:
    code = f"import {module}; print(*sorted(set({absent.split()}) & set(sys.modules)))"
    assert python(code) == ""


def test_loading_needs_neither_torch_nor_tvm(tmp_path: Path) -> None:
    build = (
        "import torch, graphopt\n"
        "graphopt.compile(torch.nn.Linear(3, 2).eval(), torch.zeros(1, 3)).export('out')\n"
    )
    python(build, cwd=tmp_path)
    code = (
        "import graphopt, numpy\n"
        "assert graphopt.load('out')(numpy.zeros((1, 3), 'float32')).shape == (1, 2)\n"
        "print(*sorted({'torch', 'tvm', 'onnx'} & set(sys.modules)))"
    )
    assert python(code, cwd=tmp_path) == ""


def test_functions_are_not_hidden_by_modules() -> None:
    code = (
        "from graphopt import Compiled\n"
        "import graphopt.compiler, graphopt.runtime.load, graphopt.backends.target\n"
        "import graphopt\n"
        "assert all(callable(f) for f in (graphopt.compile, graphopt.load, graphopt.targets))\n"
        "assert all(hasattr(graphopt, name) for name in graphopt.__all__)\n"
    )
    python(code)


def module_files() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *(part for part in parts if part != "__init__")]), path


def rank(module: str) -> int:
    """Place in ORDER of the longest listed name that `module` is or is in."""
    listed = {name: place for place, names in enumerate(ORDER) for name in names}
    parts = module.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next(listed[prefix] for prefix in prefixes if prefix in listed)


def imported(tree: ast.Module, modules: set[str]) -> Iterator[tuple[str, int]]:
    """graphopt's modules that code imports anywhere, also late, but not only for type checkers."""
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.append(whole if whole in modules else node.module or "")
        yield from ((name, node.lineno) for name in names if name.split(".")[0] == "graphopt")


def test_imports_point_one_way() -> None:
    files = list(module_files())
    modules = {name for name, _ in files}
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {module} imports {name}"
        for module, path in files
        for name, line in imported(ast.parse(path.read_text(encoding="utf-8")), modules)
        if rank(name) > rank(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_order_of_imports_is_checked() -> None:
    tree = ast.parse("def late():\n    from graphopt.backends import lower\n")
    ((name, _),) = imported(tree, {"graphopt.backends.lower"})
    assert rank(name) > rank("graphopt.passes.simplify")
    assert rank("graphopt.passes.simplify") > rank("graphopt.ops.math")
    assert rank("graphopt.runtime.loader") < rank("graphopt.runtime.artifact")
