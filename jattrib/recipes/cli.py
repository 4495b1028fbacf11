"""The command line: `jattrib run`, `jattrib list`, `jattrib unlearn`, `jattrib bench`.

Exit codes: 0, done; 2, the input or the command is wrong; 1, a directory or a file on disk is, or a computation left
the finite numbers; 130, interrupted, and the same command resumes.  Any other failure is a bug and shows its traceback.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import jattrib
from jattrib import recipes
from jattrib.core.errors import InvalidInputError, JattribError
from jattrib.recipes import rundir, shipped

app = typer.Typer(
    help="Data attribution in JAX: train, attribute, and measure whether the attributions are true.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)

INTERRUPTED = 130
UNSHOWN = (
    "device", "versions", "note", "ours_spread", "other_spread", "ours_first_s", "other_first_s", "ceiling",
    "other_fraction", "other_residual",
)  # fmt: skip
"""Columns of a benchmark that its file keeps and its table leaves out."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    try:
        app(None if arguments is None else list(arguments))
    except JattribError as error:
        _print_error(error)
        sys.exit(2 if isinstance(error, InvalidInputError) else 1)
    except SystemExit as ended:
        if ended.code == INTERRUPTED and arguments is None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)  # JAX may crash at the interpreter's end after a compilation that was cut short
        raise


def _print_version(asked: bool) -> bool:
    if asked:
        typer.echo(f"jattrib {jattrib.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="A TOML file, or a config that `jattrib list` names.")],
    out: Annotated[Path, typer.Option("--out", help="The directory to write into; the same command resumes in it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys to set, as in method.dim=8192.")
    ] = None,
) -> None:
    """Run a config; run it again to resume, or to see the figures once more."""
    file = shipped.find(config)
    recipe, settings = recipes.load(file, overrides or ())
    with rundir.opened(out, settings) as directory:
        done = rundir.is_done(directory)
        if not done:
            _announce(directory)
            try:
                recipe.run(settings, directory)
            except KeyboardInterrupt:
                Console(stderr=True).print("Interrupted. The same command resumes.")
                raise typer.Exit(INTERRUPTED) from None
            if not rundir.is_done(directory):
                raise RuntimeError(f"recipe {settings.__struct_config__.tag} ended without a summary")
        _print_summary(directory, done, () if overrides else shipped.read_header(file).expected)


@app.command("list")
def list_configs() -> None:
    """List the configs that come with the package, with what they cost and what to expect."""
    console = Console()
    for name in shipped.names():
        header = shipped.read_header(shipped.root() / name)
        expected = "\n".join(f"{part.figure} {part.text}" for part in header.expected)
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for key, value in (
            *((key, getattr(header, key)) for key in ("reproduces", "hardware", "cost")),
            ("expected", expected),
        ):
            if value:
                table.add_row(key, Text(value))
        console.print(Group(Text(name, style="bold"), Text(header.title), table))
        console.print(Text(header.command), soft_wrap=True)  # one line, to be copied
        console.print()
    if not shipped.names():
        console.print(f"No configs in {shipped.root()}.")


@app.command()
def unlearn(
    model: Annotated[Path, typer.Option("--model", help="The directory of a saved classifier.")],
    forget: Annotated[Path, typer.Option("--forget", help="Indices of training examples, one a line, or NPY.")],
    out: Annotated[Path, typer.Option("--out", help="The directory for the classifier without them.")],
    method: Annotated[
        str, typer.Option("--method", help="dmm, or a baseline: ascent_descent, scrub, ssd, ...")
    ] = "dmm",
    subset_models: Annotated[int, typer.Option("--subset-models", min=8, help="Models that dmm trains.")] = 200,
    seed: Annotated[int, typer.Option("--seed", min=-(2**63), max=2**63 - 1, help="Of everything random.")] = 0,
) -> None:
    """Make a saved classifier forget some of its training examples; the same command resumes."""
    from jattrib.recipes import unlearn as unlearning

    try:
        figures = unlearning.unlearn(model, forget, out, method=method, subset_models=subset_models, seed=seed)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted. The same command resumes.")
        raise typer.Exit(INTERRUPTED) from None
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, _shown(value))
    console = Console()
    console.print(table)
    console.print(Text(f"Classifier: {out}"), soft_wrap=True)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A file of the checkout's bench folder, without .py.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write the rows as JSON lines.")] = None,
) -> None:
    """Run a benchmark of the checkout, print its rows, and write them as JSON lines."""
    from jattrib.core import files

    if out is not None and out.is_dir():
        raise InvalidInputError(
            f"--out {out}, which is a directory",
            expected="a file for the rows",
            remedy=f"name one, for example --out {out / f'{Path(name).name}.jsonl'}",
        )
    rows = [row if isinstance(row, Mapping) else row._asdict() for row in _benchmark(name).run()]
    columns = [column for column in dict.fromkeys(chain.from_iterable(rows)) if column not in UNSHOWN]
    table = Table(*columns, title=name)
    for row in rows:
        table.add_row(*(_shown(row.get(column, "")) for column in columns))
    Console().print(table)
    if out is not None:
        context = {"device": rundir.device(), "versions": rundir.versions()}
        lines = [json.dumps(files.plain({**context, **row}), allow_nan=False) for row in rows]
        files.write_atomic(out, "".join(f"{line}\n" for line in lines).encode())


def _benchmark(name: str) -> Any:
    checkout = Path(__file__).resolve().parents[2]
    folder = checkout / "bench"
    if not (folder.is_dir() and (checkout / "pyproject.toml").is_file()):
        raise InvalidInputError(
            f"no benchmarks beside {Path(jattrib.__file__).parent}",
            expected="a checkout: benchmarks are no part of the installed package",
            remedy="clone the repository, and run `jattrib bench` with the package installed from there (`make bench`)",
        )
    known = {
        file.relative_to(folder).with_suffix("").as_posix(): file
        for file in sorted(folder.rglob("*.py"))
        if "\ndef run(" in file.read_text("utf-8")
    }
    if name not in known:
        raise InvalidInputError(
            f"no benchmark {name}",
            expected=f"one of {', '.join(known) or 'none, since the bench folder is empty'}",
            remedy="name a file of the bench folder that has a function `run`, without .py",
        )
    if str(checkout) not in sys.path:  # benchmarks import bench.harness
        sys.path.insert(0, str(checkout))
    spec = importlib.util.spec_from_file_location(f"bench.{name.replace('/', '.')}", known[name])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _announce(directory: rundir.RunDir) -> None:
    console = Console(stderr=True)
    console.print(Text(f"{'Resuming in' if directory.before else 'Writing into'} {directory.path}"))
    begun, now = rundir.begun_with(directory), rundir.versions()
    changed = [f"{name} {begun[name]} → {now[name]}" for name in now if begun.get(name, now[name]) != now[name]]
    if changed:
        console.print(f"Since the run was begun, versions have changed: {', '.join(changed)}", highlight=False)


def _print_summary(directory: rundir.RunDir, done: bool, expected: Sequence[shipped.Expected]) -> None:
    summary = rundir.read_summary(directory)
    console = Console()
    if done:
        console.print(Text(f"This run is done; to run it again, delete {directory.path}."))
    ranges = {entry.figure: entry for entry in expected}
    table = Table("figure", "value", *(["expected"] if ranges else []))
    shown = {name: value for name, value in summary.items() if not isinstance(value, dict)}
    for name, value in (dict.fromkeys(ranges, "missing") | shown).items():
        entry = ranges.get(name)
        within = entry is not None and isinstance(value, int | float) and entry.low <= value <= entry.high
        style = "" if entry is None else "green" if within else "bold red"
        table.add_row(name, Text(_shown(value), style=style), *([entry.text if entry else ""] if ranges else []))
    console.print(table)
    report = directory.path / "report.html"
    console.print(Text(f"Report: {report if report.exists() else directory.path}"), soft_wrap=True)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_error(error: JattribError) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:  # a log: no frame, no line broken
        console.print(Text(f"error: {error}"), soft_wrap=True)
        return
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    for label, text in (("got", error.got), ("expected", error.expected), ("remedy", error.remedy)):
        grid.add_row(label, Text(text, style="bold" if label == "remedy" else ""))
    console.print(Panel(grid, title="error", title_align="left", border_style="red"))
