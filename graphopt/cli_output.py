"""How the `graphopt` command prints: tables, JSON, progress and errors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

_STAGES = {
    "start": "loading PyTorch and TVM",
    "import": "reading the model",
    "passes": "rewriting the graph",
    "lower": "choosing kernels and planning memory",
    "codegen": "compiling the kernels",
    "link": "linking the library",
}


def fail(kind: str, message: str) -> NoReturn:
    """Print an error and end with status 1."""
    text = Text.assemble((f"{kind}: ", "bold red"), message)
    stderr_console().print(text, soft_wrap=True)
    raise typer.Exit(1)


def stderr_console() -> Console:
    """Where progress and errors go."""
    return Console(stderr=True, markup=False, highlight=False)


def stdout_console() -> Console:
    """Where results go."""
    console = Console(markup=False, highlight=False)
    # In a pipe there is no width to fit into; 80 columns would cut the tables.
    return console if console.is_terminal else Console(markup=False, highlight=False, width=220)


class Progress:
    """Says on standard error what is being done and how long each stage took.

    Attributes:
        seconds: how long each finished stage took.
    """

    def __init__(self) -> None:
        """Nothing is being done yet."""
        self.seconds: dict[str, float] = {}
        self._console = stderr_console()
        self._spinner = self._console.status("") if self._console.is_terminal else None
        self._stage: str | None = None
        self._since = 0.0

    def __enter__(self) -> Progress:
        """Start the spinner, where somebody looks."""
        if self._spinner:
            self._spinner.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Stop it; the last stage is over, unless it failed."""
        if self._spinner:
            self._spinner.stop()
        if kind is None:
            self._finish()

    def __call__(self, stage: str) -> None:
        """A stage begins, and the one before is over."""
        self._finish()
        self._stage, self._since = stage, time.perf_counter()
        if self._spinner:
            self._spinner.update(f"{_STAGES.get(stage, stage)} …")

    def _finish(self) -> None:
        if self._stage is None:
            return
        spent = self.seconds[self._stage] = time.perf_counter() - self._since
        self._console.print(f"{_STAGES.get(self._stage, self._stage)}: {spent:.1f} s")
        self._stage = None


def table_of(*columns: str, title: str = "", right: Sequence[str] = ()) -> Table:
    """An empty table; the columns named in `right` are aligned to the right."""
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    return table


def profile_table(steps: Sequence[tuple[str, float]]) -> Table:
    """Kernel and seconds of each step, with its share of the whole."""
    total = sum(seconds for _, seconds in steps) or 1.0
    table = table_of("step", "kernel", "ms", "%", right=("step", "ms", "%"))
    for number, (kernel, seconds) in enumerate(steps):
        table.add_row(str(number), kernel, f"{seconds * 1e3:.3f}", f"{100 * seconds / total:.1f}")
    return table


def shape_text(shape: Sequence[int], separator: str = "×") -> str:
    """`1×3×224×224`, or `scalar`."""
    return separator.join(map(str, shape)) or "scalar"


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
