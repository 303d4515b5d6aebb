"""Where in the user's PyTorch code something comes from: origins of nodes and of exceptions."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import fx

from graphopt.graph import Origin

_NOT_USER_CODE = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parent),
    "<frozen",
    "<eval_with_key>",
)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


def is_user_file(name: str) -> bool:
    """Whether a source file is the user's: neither torch's nor this importer's."""
    return not name.startswith(_NOT_USER_CODE)


def node_origin(node: fx.Node) -> Origin:
    """For example `("features.0.0 (Conv2d), model.py:12",)`; empty if export recorded nothing."""
    parts = []
    stack = node.meta.get("nn_module_stack") or {}
    if stack:
        path, module_type = list(stack.values())[-1]
        kind = str(module_type if isinstance(module_type, str) else module_type.__name__)
        kind = kind.rsplit(".", 1)[-1]
        parts.append(f"{path} ({kind})" if path else kind)
    line = user_line(node.meta.get("stack_trace") or "")
    if line:
        parts.append(line)
    return (", ".join(parts),) if parts else ()


def user_line(text: str) -> str:
    """The innermost user frame of a printed stack, as `file.py:12`, or an empty string."""
    frames = [match for match in _FRAME.finditer(text) if is_user_file(match["file"])]
    return f"{Path(frames[-1]['file']).name}:{frames[-1]['line']}" if frames else ""


def error_origin(error: BaseException) -> Origin:
    """The innermost user frame an exception came through, with its source line."""
    for frame in reversed(_frames(error)):
        if is_user_file(frame.filename):
            code = f": {frame.line}" if frame.line else ""
            return (f"{Path(frame.filename).name}:{frame.lineno}, in {frame.name}{code}",)
    line = user_line(str(error))
    return (line,) if line else ()


def _frames(error: BaseException) -> Sequence[traceback.FrameSummary]:
    """The frames between our call into torch and the raise; callers of ours are left out."""
    frames = list(traceback.extract_tb(error.__traceback__))
    last_own = max(
        (i for i, frame in enumerate(frames) if frame.filename.startswith(_NOT_USER_CODE[1])),
        default=-1,
    )
    return frames[last_own + 1 :]
