"""How the `graphopt` command prints: tables, JSON, progress and errors."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from graphopt.runtime.profile import KindTime, StepTime, Work, gbytes, gflops

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="NAME:1x3x224x224[:dtype]",
        help="Shape of an input; needed where the model leaves it open. Repeatable.",
    ),
]

_STAGES = {
    "start": "loading PyTorch and TVM",
    "import": "reading the model",
    "passes": "rewriting the graph",
    "lower": "choosing kernels and planning memory",
    "codegen": "compiling the kernels",
    "link": "linking the library",
}
_FIGURES = ("ms", "%", "GFLOP/s", "MB", "GB/s")


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
        numbers = column in right
        table.add_column(column, justify="right" if numbers else "left", no_wrap=numbers)
    return table


def step_table(steps: Sequence[StepTime], total: float) -> Table:
    """What each step is and took; `total` is the seconds of all, to give their shares of."""
    table = table_of("step", *_FIGURES, "tasks", "kernel", "configuration", "operators", "from",
                     right=("step", *_FIGURES, "tasks"))  # fmt: skip
    for step in steps:
        table.add_row(
            str(step.number),
            *_figures(step, total),
            str(step.tasks),
            step.kernel,
            step.configuration,
            " + ".join(step.ops),
            place_text(step.origin),
        )
    return table


def kind_table(kinds: Sequence[KindTime], total: float) -> Table:
    """The same by generator, and the whole."""
    table = table_of("steps", *_FIGURES, "kernels", right=("steps", *_FIGURES))
    for kind in kinds:
        table.add_row(str(kind.steps), *_figures(kind, total), kind.kind)
    whole = KindTime(
        "all",
        sum(kind.steps for kind in kinds),
        sum(kind.flops for kind in kinds),
        sum(kind.moved for kind in kinds),
        total,
    )
    table.add_row(str(whole.steps), *_figures(whole, total), whole.kind)
    return table


def _figures(work: Work, total: float) -> list[str]:
    share = work.seconds / total if total else 0.0
    return [
        f"{work.seconds * 1e3:.3f}",
        f"{100 * share:.1f}",
        f"{gflops(work):.1f}" if work.flops else "",
        f"{work.moved / 1e6:.2f}",
        f"{gbytes(work):.1f}",
    ]


def shape_text(shape: Sequence[int], separator: str = "×") -> str:
    """`1×3×224×224`, or `scalar`."""
    return separator.join(map(str, shape)) or "scalar"


def place_text(origin: Sequence[str]) -> str:
    """Where in the user's model something comes from: the first place, and how many more."""
    more = f" and {len(origin) - 1} more" if len(origin) > 1 else ""
    return f"{origin[0]}{more}" if origin else ""


def print_json(value: object) -> None:
    """One JSON value on standard output."""
    typer.echo(json.dumps(value, indent=1, ensure_ascii=False))
