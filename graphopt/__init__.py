"""graphopt: an ahead-of-time compiler from PyTorch and ONNX models to small libraries for boards.

`compile` builds, `load` runs what was built. Nothing heavy is imported before it is used: a board
that only loads artifacts needs neither PyTorch nor TVM.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.backends.target import Target, get_target, targets
    from graphopt.backends.tuning import TuningDatabase
    from graphopt.compiler import Compiled, compile
    from graphopt.errors import (
        ArtifactError,
        GraphoptError,
        InputError,
        ModelError,
        TargetError,
        ToolchainError,
        TuningError,
        UnsupportedError,
        VerifyError,
    )
    from graphopt.runtime.load import load
    from graphopt.tuner import Tuned, tune

# No module is called `compile` or `tune`: importing it would put it in the place of the function.
_HOMES = {
    "Compiled": "graphopt.compiler",
    "compile": "graphopt.compiler",
    "load": "graphopt.runtime.load",
    "Target": "graphopt.backends.target",
    "get_target": "graphopt.backends.target",
    "targets": "graphopt.backends.target",
    "Tuned": "graphopt.tuner",
    "TuningDatabase": "graphopt.backends.tuning",
    "tune": "graphopt.tuner",
    **dict.fromkeys(
        ("ArtifactError", "GraphoptError", "InputError", "ModelError", "TargetError",
         "ToolchainError", "TuningError", "UnsupportedError", "VerifyError"),
        "graphopt.errors",
    ),
}  # fmt: skip

__all__ = [
    "ArtifactError",
    "Compiled",
    "GraphoptError",
    "InputError",
    "ModelError",
    "Target",
    "TargetError",
    "ToolchainError",
    "Tuned",
    "TuningDatabase",
    "TuningError",
    "UnsupportedError",
    "VerifyError",
    "compile",
    "get_target",
    "load",
    "targets",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'graphopt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
