"""Runs a model that graphopt compiled, from Python: numpy in, numpy out.

Needs numpy and the standard library only. This very file is also the `<name>.py` of every build,
so on a board the folder is all there is to install:

    from mobilenet import Model

    with Model() as model:
        y = model(x)
"""

from __future__ import annotations

import _ctypes
import ctypes
import json
import math
import platform
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

FORMAT = "graphopt-artifact"
FORMAT_VERSION = 1

Array = npt.NDArray[Any]


class ArtifactError(RuntimeError):
    """The folder is missing or damaged, or its library does not run on this CPU."""


class InputError(ValueError):
    """The arrays do not fit the model: wrong count, name, shape or dtype."""


class _Options(ctypes.Structure):
    _fields_ = (
        ("threads", ctypes.c_uint),
        ("arena", ctypes.c_void_p),
        ("arena_size", ctypes.c_size_t),
    )


class _Tensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t))


class Tensor:
    """One input or output of a model: `name`, `shape`, `dtype`."""

    def __init__(self, entry: dict[str, Any]) -> None:
        """From a manifest's entry."""
        self.name: str = entry["name"]
        self.shape: tuple[int, ...] = tuple(int(dim) for dim in entry["shape"])
        self.dtype: np.dtype[Any] = np.dtype(entry["dtype"])
        self.nbytes: int = math.prod(self.shape) * self.dtype.itemsize

    def __repr__(self) -> str:
        """As people write it: `x float32[1, 3, 224, 224]`."""
        return f"{self.name} {self.dtype}{list(self.shape)}"


def read_manifest(folder: str | Path, error: type[Exception] = ArtifactError) -> dict[str, Any]:
    """The one manifest in a folder that graphopt built.

    Raises:
        ArtifactError: there is none, or it is damaged or of a newer format (raised as `error`).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise error(f"{folder} is not a folder")
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and manifest.get("format") == FORMAT:
            found.append(manifest)
    if len(found) != 1:
        raise error(
            f"{folder} holds {len(found)} manifests of graphopt models instead of one; "
            "it should be a folder that graphopt built"
        )
    if found[0].get("format_version") != FORMAT_VERSION:
        raise error(
            f"{folder} has format version {found[0].get('format_version')}; this loader reads "
            f"{FORMAT_VERSION}: use the .py file that came with it"
        )
    return found[0]


def _load_library(path: Path) -> ctypes.CDLL:
    # The dynamic linker takes a library that is loaded under the same path for the same library,
    # even when a new build has replaced the file: give each load a path of its own. The same file
    # is still loaded only once.
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        link = Path(folder, path.name)
        link.symlink_to(path)
        return ctypes.CDLL(str(link))


class Model:
    """A compiled model, ready to run. Safe to call from several threads; calls take turns.

    Args:
        folder: the folder that was built; by default the one this file is in.
        threads: threads to work with (None: the default of the build).

    Raises:
        ArtifactError: the folder is not complete, or the library is for another CPU.
    """

    artifact_error: ClassVar[type[Exception]] = ArtifactError
    input_error: ClassVar[type[Exception]] = InputError

    def __init__(self, folder: str | Path | None = None, threads: int | None = None) -> None:
        """Load the library and make a context; see the class for the arguments."""
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.manifest = read_manifest(self.folder, self.artifact_error)
        self.name: str = self.manifest["name"]
        self.inputs = tuple(Tensor(entry) for entry in self.manifest["inputs"])
        self.outputs = tuple(Tensor(entry) for entry in self.manifest["outputs"])
        self.threads: int = threads or self.manifest["threads"]
        self._lock = threading.Lock()
        self._context: ctypes.c_void_p | None = None
        self._open()

    def __call__(self, *args: Array, **named: Array) -> Array | tuple[Array, ...]:
        """Run the model once.

        Args:
            args: the inputs in the model's order,
            named: or by name (both may be mixed); shapes and dtypes must be the model's.

        Returns:
            A new array, or with several outputs a tuple in the model's order.

        Raises:
            InputError: count, names, shapes or dtypes are not the model's.
        """
        results = self._execute(self.bind(args, named))
        return results[0] if len(results) == 1 else results

    def bind(self, args: Sequence[Array], named: dict[str, Array]) -> tuple[Array, ...]:
        """The inputs in the model's order, checked, dense and aligned."""
        if not named and len(args) == len(self.inputs) and all(map(_is_ready, self.inputs, args)):
            return tuple(args)
        names = [tensor.name for tensor in self.inputs]
        expected = f"{self.name} takes {', '.join(map(repr, self.inputs)) or 'no inputs'}"
        if len(args) > len(names):
            raise self.input_error(f"{len(args)} inputs given; {expected}")
        given = dict(zip(names, args, strict=False))
        for name, array in named.items():
            if name not in names:
                raise self.input_error(f"there is no input {name!r}; {expected}")
            if name in given:
                raise self.input_error(f"input {name!r} is given twice; {expected}")
            given[name] = array
        missing = [name for name in names if name not in given]
        if missing:
            raise self.input_error(f"input {', '.join(map(repr, missing))} is missing; {expected}")
        return tuple(self._check(tensor, given[tensor.name]) for tensor in self.inputs)

    def _check(self, tensor: Tensor, value: Array) -> Array:
        if not isinstance(value, np.ndarray):
            kind = type(value).__name__
            raise self.input_error(f"input {tensor.name!r} is a {kind}; pass a numpy array")
        if value.shape != tensor.shape:
            raise self.input_error(
                f"input {tensor.name!r} has shape {list(value.shape)}; the model was compiled for "
                f"{list(tensor.shape)}"
            )
        if value.dtype != tensor.dtype:
            raise self.input_error(
                f"input {tensor.name!r} is {value.dtype}; the model takes {tensor.dtype} "
                f"(convert it with .astype(numpy.{tensor.dtype}))"
            )
        return np.require(value, requirements=("C", "A"))

    def sample_inputs(self, seed: int = 0) -> tuple[Array, ...]:
        """Inputs to time with: normal noise for floats, zeros (always a valid index) for others."""
        rng = np.random.default_rng(seed)
        return tuple(
            rng.standard_normal(tensor.shape).astype(tensor.dtype)
            if tensor.dtype.kind == "f"
            else np.zeros(tensor.shape, tensor.dtype)
            for tensor in self.inputs
        )

    def time(self, repeats: int = 10, *args: Array, warmup: int = 1) -> list[float]:
        """Seconds of each of `repeats` runs, after `warmup` runs that do not count.

        Without inputs it takes `sample_inputs()`.
        """
        inputs = self.bind(args, {}) if args else self.sample_inputs()
        seconds = []
        for _ in range(warmup + repeats):
            begin = time.perf_counter()
            self._execute(inputs)
            seconds.append(time.perf_counter() - begin)
        return seconds[warmup:]

    def profile(self, *args: Array, repeats: int = 1) -> list[tuple[str, float]]:
        """Kernel and seconds of each step, in order: the fastest of `repeats` runs of each."""
        inputs = self.bind(args, {}) if args else self.sample_inputs()
        count = len(self.manifest["steps"])
        times = (ctypes.c_uint64 * count)()
        best = np.full(count, np.inf)
        with self._lock:
            self._call("profile", self._context, times, ctypes.c_size_t(count))
            try:
                for _ in range(repeats):
                    self._run(inputs)
                    best = np.minimum(best, np.array(times, dtype=np.float64))
            finally:
                self._call("profile", self._context, None, ctypes.c_size_t(0))
        kernels = [step["kernel"] for step in self.manifest["steps"]]
        return list(zip(kernels, (best / 1e9).tolist(), strict=True))

    def close(self) -> None:
        """End the threads and free the memory; the model cannot be called any more."""
        with self._lock:
            context, self._context = self._context, None
            if context:
                self._function("destroy", None)(context)
                _ctypes.dlclose(self._library._handle)

    def __enter__(self) -> Model:
        """The model itself; leaving the block closes it."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the model."""
        self.close()

    def __del__(self) -> None:
        """Close a model nobody closed."""
        if getattr(self, "_context", None):
            self.close()

    def _open(self) -> None:
        target = self.manifest["target"]
        if platform.machine() != target["arch"]:
            raise self.artifact_error(
                f"{self.name} was built for {target['name']} ({target['arch']}); this machine is "
                f"{platform.machine()}"
            )
        path = (self.folder / f"lib{self.name}.so").resolve()
        try:
            self._library = _load_library(path)
        except OSError as error:
            raise self.artifact_error(f"cannot load {path}: {error}") from error
        context = ctypes.c_void_p()
        options = _Options(self.threads, None, 0)
        status = self._function("create")(ctypes.byref(context), ctypes.byref(options))
        if status:
            message = self._message(None, status)
            _ctypes.dlclose(self._library._handle)
            raise self.artifact_error(message)
        self._context = context
        # What `run` takes, made once: building it costs more than a small model takes to run.
        ins = (_Tensor * len(self.inputs))(*[_Tensor(None, each.nbytes) for each in self.inputs])
        outs = (_Tensor * len(self.outputs))(*[_Tensor(None, each.nbytes) for each in self.outputs])
        self._places = (*ins, *outs)  # Share the arrays' memory.
        self._run_function = self._function("run")
        self._run_arguments = (context, ins, ctypes.c_size_t(len(ins)),
                               outs, ctypes.c_size_t(len(outs)))  # fmt: skip

    def _function(self, name: str, result: Any = ctypes.c_int) -> Any:
        function = getattr(self._library, f"{self.name}_{name}")
        function.restype = result
        return function

    def _message(self, context: ctypes.c_void_p | None, status: int) -> str:
        text = self._function("last_error", ctypes.c_char_p)(context)
        if not text:
            text = self._function("status_text", ctypes.c_char_p)(status)
        return str(text.decode())

    def _call(self, name: str, *args: Any) -> None:
        if self._context is None:
            raise self.artifact_error(f"{self.name} is closed")
        status = self._function(name)(*args)
        if status:
            raise self.artifact_error(self._message(self._context, status))

    def _execute(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Run once on checked inputs; what a model on another device does instead."""
        with self._lock:
            return self._run(inputs)

    def _run(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        if self._context is None:
            raise self.artifact_error(f"{self.name} is closed")
        outputs = tuple([np.empty(tensor.shape, tensor.dtype) for tensor in self.outputs])
        for place, array in zip(self._places, (*inputs, *outputs), strict=True):
            place.data = _address(array)
        status = self._run_function(*self._run_arguments)
        if status:
            raise self.artifact_error(self._message(self._context, status))
        return outputs


def _is_ready(tensor: Tensor, value: Array) -> bool:
    """Whether the model can read the array as it is."""
    if type(value) is not np.ndarray or value.shape != tensor.shape or value.dtype != tensor.dtype:
        return False
    flags = value.flags
    return flags.c_contiguous and flags.aligned


def _address(array: Array) -> int:
    """Where a dense array's data lies: what `array.ctypes.data` says, in a tenth of its time."""
    buffer: Any = array  # mypy does not know that it is one.
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except (TypeError, ValueError):  # It is read-only or empty.
        return int(array.ctypes.data)
