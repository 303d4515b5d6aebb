"""`graphopt.compile`: a trained model in, one self-contained library out."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.backends.codegen import compile_kernels
from graphopt.backends.emit_c import check_name
from graphopt.backends.lower import lower
from graphopt.backends.target import Target, get_target
from graphopt.backends.toolchain import CompilerName, find_toolchain
from graphopt.backends.tuning import TuningDatabase, find_database
from graphopt.errors import GraphoptError
from graphopt.importers import ExampleInputs, import_model
from graphopt.passes.base import Context, Pass
from graphopt.passes.manager import run_passes
from graphopt.passes.pipeline import resolve
from graphopt.program.ir import Program
from graphopt.report import Report
from graphopt.runtime.artifact import Artifact, build_artifact
from graphopt.runtime.load import LoadedModel, load

Progress = Callable[[str], None]
"""Is told each stage of a build as it begins: `import`, `passes`, `lower`, `codegen`."""


class Compiled:
    """A compiled model: run it, look into it, or export it as a library.

    Attributes:
        graph: the rewritten graph, an `fx.GraphModule` that runs in PyTorch.
        program: the kernels, buffers and steps it was lowered to.
        target: what it was compiled for.
        report: what was done; print it, or take `report.as_dict()`.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        program: Program,
        target: Target,
        kernels: bytes,
        report: Report,
        threads: int | None,
        cc: CompilerName | None,
    ) -> None:
        """Made by `graphopt.compile`."""
        self.graph = graph
        self.program = program
        self.target = target
        self.report = report
        self._kernels = kernels
        self._threads = threads
        self._cc = cc
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._model: LoadedModel | None = None

    def export(self, folder: str | Path) -> Artifact:
        """Write `lib<name>.so`, `lib<name>.a`, `<name>.h`, `<name>.json` and `<name>.py`.

        The folder appears when all is done; an older export of the same model is replaced.

        Raises:
            ToolchainError: there is no C compiler for the target; says what to install.
            ArtifactError: the folder holds other things.
        """
        artifact = build_artifact(
            self.program,
            self.target,
            self._kernels,
            folder,
            cc=self._cc,
            threads=self._threads,
            report=self.report.as_dict(times=False),
        )
        self.report = self.report.with_flash(artifact.library.stat().st_size)
        return artifact

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """Run the model, here or under an emulator.

        Args:
            *inputs: arrays or tensors in the model's order, of its shapes and dtypes.
            **named: the same by input name.

        Returns:
            one output bare, several as a tuple in model order; torch tensors if any input was one.

        Raises:
            InputError: wrong number, name, shape or dtype of inputs.
        """
        as_torch = any(isinstance(x, torch.Tensor) for x in (*inputs, *named.values()))
        result = self.loaded()(
            *(_to_numpy(x) for x in inputs), **{key: _to_numpy(x) for key, x in named.items()}
        )
        if not as_torch:
            return result
        if isinstance(result, tuple):
            return tuple(torch.from_numpy(array) for array in result)
        return torch.from_numpy(result)

    def loaded(self) -> LoadedModel:
        """The model exported to a temporary folder and loaded from there."""
        if self._model is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
            folder = Path(self._folder.name) / "build"
            self.export(folder)
            self._model = load(folder)
        return self._model


def _to_numpy(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)


def compile(
    model: object,
    inputs: ExampleInputs = None,
    *,
    target: str | Target = "host",
    passes: Sequence[str | Pass] | None = None,
    threads: int | None = None,
    name: str = "model",
    winograd: bool = True,
    strassen: bool = True,
    tune: str | Path | TuningDatabase | None = None,
    cc: CompilerName | None = None,
    progress: Progress | None = None,
) -> Compiled:
    """Compile a model for a target.

    Args:
        model: an `nn.Module` in eval mode, a `torch.export.ExportedProgram`, the path of a `.pt2`
            or `.onnx` file, or an `onnx.ModelProto`; it is not changed.
        inputs: example tensors or arrays: one, a tuple, or a dict by input name. Needed for an
            `nn.Module`, and for ONNX where a dimension is dynamic. Their shapes and dtypes are the
            compiled model's.
        target: a name from `graphopt.targets()`, or a `Target`.
        passes: the graph passes to run instead of the default pipeline, by name or as objects.
        threads: default number of threads of the library (None: 1); a program that uses it can
            choose another when it creates a context.
        name: prefix of all the library's symbols and files, a C identifier.
        winograd: whether convolutions, transposed ones too, may use Winograd's algorithm where
            it is estimated to be faster. It rounds differently (error up to about
            2e-6 of a layer's largest output with kernels of 3×3, 8e-6 with larger ones, where
            direct convolution has 5e-7) and its weights take up to five times the flash, small
            ones with strides up to nine.
        strassen: whether large products by constant matrices, and pointwise convolutions, may use
            Strassen's algorithm where it is estimated to be faster: seven products of quarters
            instead of eight. It rounds differently (error up to about 3e-6 of the largest output
            of a layer, where direct products have 5e-7), and what is not finite spreads to other
            outputs of the same sample.
        tune: what `graphopt.tune` measured: a file or a `TuningDatabase`. It decides on algorithms
            and register tiles, before the entries that come with graphopt; where neither knows a
            kernel, the estimate decides.
        cc: C compiler to link with, for example `aarch64-linux-gnu-gcc`; by default graphopt finds
            one (`GRAPHOPT_CC_<ARCH>`, the system's, PyPI's ziglang).
        progress: is told each stage as it begins.

    Raises:
        GraphoptError: one of its subclasses, saying what is wrong, where, and what to do.
    """
    chosen = get_target(target)
    check_name(name)
    todo = resolve(passes)
    if threads is not None and threads < 1:
        raise GraphoptError(f"threads={threads} is not possible", hint="give 1 or more.")
    choice = find_database(tune).choice(chosen)
    # Asked before the long work: a missing compiler should not be news at the end.
    find_toolchain(chosen, cc)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(what: str) -> Iterator[None]:
        if progress is not None:
            progress(what)
        start = time.perf_counter()
        yield
        seconds[what] = time.perf_counter() - start

    with torch.no_grad():
        with stage("import"):
            graph = import_model(model, inputs)
        with stage("passes"):
            records = run_passes(graph, todo, Context())
        with stage("lower"):
            program = lower(graph, chosen, name, winograd=winograd, strassen=strassen,
                            choice=choice)  # fmt: skip
        with stage("codegen"):
            kernels = compile_kernels(program, chosen)
    report = Report(name, replace(chosen), tuple(records), program, seconds)
    return Compiled(graph, program, chosen, kernels, report, threads, cc)
