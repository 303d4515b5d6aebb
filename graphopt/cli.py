"""The `graphopt` command: compile a model, run what was built, time it, look into it.

Results go to standard output (tables for people, with `--json` one JSON value for machines),
progress and errors to standard error. Exit status: 0, 1 for an error, 2 for a wrong command line.
"""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from graphopt.cli_output import (
    Inputs,
    Json,
    Progress,
    fail,
    kind_table,
    place_text,
    print_json,
    shape_text,
    stderr_console,
    stdout_console,
    step_table,
    table_of,
)
from graphopt.cli_tune import tune_command
from graphopt.errors import ArtifactError, GraphoptError

# Nothing here imports numpy, torch or tvm at the top: `graphopt targets` and `--help` stay quick.
if TYPE_CHECKING:
    from graphopt.runtime.load import LoadedModel
    from graphopt.runtime.loader import Model

_BUDGET_SECONDS = 3.0
"""How long `bench` and `profile` measure unless told how often."""


class _Commands(TyperGroup):
    """Turns exceptions into messages: users see no tracebacks unless they ask for them."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            # Exit, Abort and usage errors are the command line's own; they are handled further up.
            if ctx.params.get("debug") or type(error).__module__.startswith("typer."):
                raise
            if isinstance(error, GraphoptError | OSError):
                fail(type(error).__name__, str(error))
            fail(
                "bug in graphopt",
                f"{type(error).__name__}: {error}\n"
                "  hint: run it again with GRAPHOPT_DEBUG=1 and report what it prints.",
            )


app = typer.Typer(
    cls=_Commands,
    name="graphopt",
    help="Compile PyTorch and ONNX models to small self-contained libraries.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that graphopt built.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads (default: the build's).")]
Repeat = Annotated[
    int | None, typer.Option(min=1, help="Runs to time (default: as many as fit in 3 s).")
]
Warmup = Annotated[int, typer.Option(min=0, help="Runs before, not counted.")]


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def _main(
    debug: Annotated[
        bool, typer.Option("--debug", envvar="GRAPHOPT_DEBUG", help="Show tracebacks.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile PyTorch and ONNX models to small self-contained libraries."""


@app.command("compile")
def compile_command(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="A .onnx or .pt2 file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to.")],
    target: Annotated[
        str, typer.Option(help="What to build for: see `graphopt targets`.")
    ] = "host",
    inputs: Inputs = None,
    name: Annotated[str, typer.Option(help="Prefix of the library's symbols and files.")] = "model",
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads the library uses by default (1).")
    ] = None,
    passes: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Run these passes only: see `graphopt passes`."),
    ] = None,
    winograd: Annotated[
        bool, typer.Option(help="Let convolutions use Winograd: faster, but larger weights.")
    ] = True,
    strassen: Annotated[
        bool, typer.Option(help="Let products use Strassen: faster, but larger rounding errors.")
    ] = True,
    tune: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `graphopt tune` measured of the kernels."),
    ] = None,
    cc: Annotated[str | None, typer.Option(help="C compiler to link with.")] = None,
    report: Annotated[bool, typer.Option(help="Print all that was done to the model.")] = False,
    as_json: Json = False,
) -> None:
    """Compile a model to a folder: a library, its C header, a manifest and a Python loader."""
    from graphopt.cli_inputs import example_inputs, read_specs

    specs = read_specs(inputs)
    with Progress() as progress:
        progress("start")
        # Only now: importing torch and tvm takes seconds, and the user should see why they wait.
        from graphopt.compiler import compile as compile_model

        compiled = compile_model(
            model,
            example_inputs(specs, model),
            target=target,
            passes=None if passes is None else [each for each in passes.split(",") if each],
            threads=threads,
            name=name,
            winograd=winograd,
            strassen=strassen,
            tune=tune,
            cc=cc,
            progress=progress,
        )
        progress("link")
        artifact = compiled.export(output)
    files = {file: entry["bytes"] for file, entry in artifact.manifest["files"].items()}
    files[f"{name}.json"] = (artifact.folder / f"{name}.json").stat().st_size
    if as_json:
        print_json(
            {
                "folder": str(artifact.folder),
                "name": name,
                "target": compiled.target.name,
                "seconds": progress.seconds,
                "files": files,
                "report": compiled.report.as_dict(),
            }
        )
        return
    if report:
        typer.echo(str(compiled.report))
        return
    memory = artifact.manifest["memory"]
    table = table_of("file", "bytes", right=("bytes",))
    for file, nbytes in files.items():
        table.add_row(str(artifact.folder / file), f"{nbytes:,}")
    console = stdout_console()
    console.print(table)
    console.print(
        f"{len(artifact.manifest['steps'])} steps; weights {memory['weights']:,} bytes, "
        f"arena {memory['arena']:,} bytes, {memory['scratch_per_thread']:,} more per thread"
    )


app.command("tune")(tune_command)


@app.command("run")
def run_command(
    folder: Folder,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input",
            metavar="x.npy|x.npz",
            help="An .npz with all inputs by name, or an .npy per input in the model's order "
            "(or NAME=x.npy). Repeatable.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="y.npz", help="Where to write the outputs (or y.npy).")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run a built model once on saved arrays, here or under an emulator."""
    from graphopt.cli_inputs import describe, read_arrays, write_arrays

    with _load(folder, threads) as model:
        args, named = read_arrays(inputs)
        result = model(*args, **named)
        arrays = result if isinstance(result, tuple) else (result,)
        names = [tensor.name for tensor in model.outputs]
    if output is not None:
        write_arrays(output, names, arrays)
    rows = [describe(*each) for each in zip(names, arrays, strict=True)]
    if as_json:
        print_json({"outputs": rows, "output": None if output is None else str(output)})
        return
    table = table_of("output", "dtype", "shape", "min", "max", "mean", "largest at")
    for row in rows:
        values = [row[key] for key in ("min", "max", "mean")]
        table.add_row(
            row["name"],
            row["dtype"],
            shape_text(row["shape"]),
            *("" if value is None else f"{value:.6g}" for value in values),
            "" if row["argmax"] is None else shape_text(row["argmax"], ", "),
        )
    stdout_console().print(table)


@app.command("bench")
def bench_command(
    folder: Folder,
    threads: Threads = None,
    repeat: Repeat = None,
    warmup: Warmup = 3,
    as_json: Json = False,
) -> None:
    """Time a built model on random inputs: minimum, median and 99th percentile."""
    import statistics

    with _load(folder, threads) as model:
        runs = _runs(model, repeat, warmup)
        times = sorted(model.time(runs, warmup=0))
        is_emulated = model.manifest["target"]["arch"] != platform.machine()
        used, name = model.threads, model.name
    # The smallest time that at least 99 of 100 runs do not exceed.
    p99 = times[math.ceil(0.99 * len(times)) - 1]
    figures = {"min": times[0], "median": statistics.median(times), "p99": p99}
    if as_json:
        print_json(
            {
                "name": name,
                "threads": used,
                "runs": runs,
                "emulated": is_emulated,
                **{f"{key}_ms": value * 1e3 for key, value in figures.items()},
            }
        )
        return
    if is_emulated:
        stderr_console().print("under an emulator: these times say nothing about the board")
    table = table_of("model", "threads", "runs", *(f"{key} ms" for key in figures))
    times_ms = (f"{value * 1e3:.3f}" for value in figures.values())
    table.add_row(name, str(used), str(runs), *times_ms)
    stdout_console().print(table)


@app.command("profile")
def profile_command(
    folder: Folder,
    threads: Threads = None,
    sort: Annotated[
        Literal["time", "order"], typer.Option(help="Slowest first, or in the order they run in.")
    ] = "time",
    limit: Annotated[int | None, typer.Option(min=1, help="Steps to show (default: all).")] = None,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write a trace for chrome://tracing or Perfetto."),
    ] = None,
    repeat: Repeat = None,
    warmup: Warmup = 3,
    as_json: Json = False,
) -> None:
    """Time each step of a built model on random inputs: the fastest of many runs."""
    from graphopt.runtime.profile import as_json as profile_json
    from graphopt.runtime.profile import by_kind, chosen, chrome_trace, profile_steps

    with _load(folder, threads) as model:
        # Refused before the long part where steps cannot be timed.
        profile_steps(model)
        runs = _runs(model, repeat, warmup)
        steps = profile_steps(model, runs)
        used, name = model.threads, model.name
    if trace is not None:
        trace.write_text(json.dumps(chrome_trace(name, used, steps), ensure_ascii=False), "utf-8")
    if as_json:
        head = {"name": name, "threads": used, "runs": runs}
        print_json({**head, **profile_json(steps, sort, limit)})
        return
    total = sum(step.seconds for step in steps)
    shown = chosen(steps, sort, limit)
    console = stdout_console()
    console.print(f"{name}, {used} thread{'s' if used > 1 else ''}, fastest of {runs} runs")
    console.print(step_table(shown, total))
    if len(shown) < len(steps):
        console.print(f"… and {len(steps) - len(shown)} steps more")
    console.print()
    console.print(kind_table(by_kind(steps), total))


@app.command("targets")
def targets_command(as_json: Json = False) -> None:
    """List what graphopt builds for."""
    from graphopt.backends.target import targets

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "arch": target.arch,
            "isa": target.isa.name,
            "features": list(target.features),
            "description": target.description,
        }
        for name, target in targets().items()
    ]
    if as_json:
        print_json(rows)
        return
    table = table_of("target", "architecture", "vectors", "description")
    for row in rows:
        table.add_row(row["name"], row["arch"], row["isa"], row["description"])
    stdout_console().print(table)


@app.command("passes")
def passes_command(as_json: Json = False) -> None:
    """List the graph passes in the order they run in."""
    from graphopt.passes.pipeline import default_pipeline

    rows = [
        {"name": each.name, "effect": str(each.effect), "summary": each.summary}
        for each in default_pipeline()
    ]
    if as_json:
        print_json(rows)
        return
    table = table_of("", "pass", "effect", "what it does")
    for number, row in enumerate(rows, start=1):
        table.add_row(str(number), row["name"], row["effect"], row["summary"])
    stdout_console().print(table)


@app.command("inspect")
def inspect_command(folder: Folder, as_json: Json = False) -> None:
    """Show what a built folder holds: interface, memory, files and steps."""
    from graphopt.runtime.loader import read_manifest

    manifest = read_manifest(folder, ArtifactError)
    if as_json:
        print_json(manifest)
        return
    target, memory = manifest["target"], manifest["memory"]
    console = stdout_console()
    console.print(f"{manifest['name']} for {target['name']} ({target['arch']})")
    table = table_of("", "name", "dtype", "shape", title="interface")
    for kind in ("inputs", "outputs"):
        for entry in manifest[kind]:
            table.add_row(kind[:-1], entry["name"], entry["dtype"], shape_text(entry["shape"]))
    console.print(table)
    table = table_of("what", "bytes", title="memory and files", right=("bytes",))
    for what, nbytes in memory.items():
        table.add_row(what.replace("_", " "), f"{nbytes:,}")
    for file, entry in manifest["files"].items():
        table.add_row(file, f"{entry['bytes']:,}")
    console.print(table)
    table = table_of("", "kernel", "operators", "Mflop", "from", title="steps", right=("", "Mflop"))
    for number, step in enumerate(manifest["steps"]):
        table.add_row(
            str(number),
            step["kernel"],
            " + ".join(step["ops"]),
            f"{step['flops'] / 1e6:.2f}",
            place_text(step["origin"]),
        )
    console.print(table)


def _load(folder: Path, threads: int | None) -> LoadedModel:
    from graphopt.runtime.load import load

    return load(folder, threads)


def _runs(model: Model, repeat: int | None, warmup: int) -> int:
    """How often to measure, after the runs that do not count."""
    first = model.time(1, warmup=warmup)[0]
    return repeat or max(5, min(2000, math.ceil(_BUDGET_SECONDS / max(first, 1e-9))))
