"""The errors graphopt raises: each says what happened, where in the model, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class GraphoptError(Exception):
    """Base of every error graphopt raises on purpose.

    Args:
        what: what went wrong, in one sentence.
        where: the origins in the user's model (module path and source line, or ONNX node).
        hint: what the user can do about it.
    """

    def __init__(self, what: str, *, where: Sequence[str] = (), hint: str = "") -> None:
        """See the class for the arguments."""
        self.what = what
        self.where = tuple(where)
        self.hint = hint
        lines = [what, *(f"  at {place}" for place in self.where)]
        if hint:
            lines.append(f"  hint: {hint}")
        super().__init__("\n".join(lines))


class ModelError(GraphoptError):
    """The model cannot be read or traced: a broken or missing file, control flow, training mode."""


class UnsupportedError(GraphoptError):
    """The model uses operators graphopt cannot compile; lists all of them with their origins."""


class InputError(GraphoptError):
    """Inputs do not fit the model: wrong count, name, shape or dtype."""


class VerifyError(GraphoptError):
    """A graph broke an invariant after import or after a pass; always a bug in that step."""


class TargetError(GraphoptError):
    """The target is unknown, or this machine or board cannot build for it or run it."""


class ToolchainError(TargetError):
    """No working C compiler for the target was found, or it failed."""


class ArtifactError(GraphoptError):
    """A built artifact is missing, incomplete, damaged, or was built for another CPU."""


class TuningError(GraphoptError):
    """A tuning database is missing, damaged, or of another version of graphopt."""
