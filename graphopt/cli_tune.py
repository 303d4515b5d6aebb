"""`graphopt tune`: measure each kernel's configurations, and store the fastest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli_output import (
    Inputs,
    Json,
    Progress,
    place_text,
    print_json,
    stdout_console,
    table_of,
)

# Only for its names: what it imports takes seconds.
if TYPE_CHECKING:
    from graphopt.tuner import Tuned


def tune_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .onnx or .pt2 file.")],
    database: Annotated[
        Path,
        typer.Option("--database", "-d", metavar="FILE", help="What to add to; made if missing."),
    ],
    target: Annotated[
        str, typer.Option(help="What to build for; this machine must be able to run it.")
    ] = "host",
    inputs: Inputs = None,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Stop after this time (default: when all is done).")
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads to measure with.")] = 1,
    cc: Annotated[str | None, typer.Option(help="C compiler to link with.")] = None,
    as_json: Json = False,
) -> None:
    """Measure each kernel's configurations here; `compile --tune FILE` takes the fastest."""
    from graphopt.cli_inputs import example_inputs, read_specs

    specs = read_specs(inputs)
    with Progress() as progress:
        progress("start")
        # Only now: importing torch and tvm takes seconds, and the user should see why they wait.
        from graphopt.tuner import tune

        tuned = tune(
            model,
            example_inputs(specs, model),
            database=database,
            target=target,
            seconds=seconds,
            threads=threads,
            cc=cc,
            progress=progress,
        )
    if as_json:
        print_json(_as_json(tuned, database))
        return
    _print(tuned, database)


def _as_json(tuned: Tuned, database: Path) -> dict[str, object]:
    kernels = [
        {
            "key": each.key,
            "origin": list(each.origin),
            "choice": each.entry.choice,
            "seconds": each.entry.seconds,
            "default": each.entry.default,
            "default_seconds": each.entry.default_seconds,
        }
        for each in tuned.measured
    ]
    return {
        "database": str(database),
        "entries": len(tuned.database),
        "known": tuned.known,
        "left": tuned.left,
        "kernels": kernels,
    }


def _print(tuned: Tuned, database: Path) -> None:
    table = table_of("default", "ms", "fastest", "ms", "gain", "from", right=("ms", "gain"))
    for each in tuned.measured:
        entry = each.entry
        is_changed = entry.choice != entry.default
        table.add_row(
            entry.default,
            f"{entry.default_seconds * 1e3:.4f}",
            entry.choice if is_changed else "the same",
            f"{entry.seconds * 1e3:.4f}" if is_changed else "",
            f"{entry.gain:.2f}" if is_changed else "",
            place_text(each.origin),
        )
    console = stdout_console()
    if tuned.measured:
        console.print(table)
    console.print(
        f"{len(tuned.measured)} kernels measured, {tuned.known} known before, {tuned.left} left "
        f"for lack of time; {database} has {len(tuned.database)} entries"
    )
