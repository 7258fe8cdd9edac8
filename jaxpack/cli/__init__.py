"""Defines the commands of `jaxpack`: train, inspect, generate, export, bench, demo. May import torch_bridge."""

import sys

import typer

from jaxpack.cli.bench import bench
from jaxpack.cli.demo import demo
from jaxpack.cli.export import export
from jaxpack.cli.generate import generate
from jaxpack.cli.inspect import inspect
from jaxpack.cli.train import train
from jaxpack.errors import InputError
from jaxpack.utils.console import console

app = typer.Typer(
    help="Packed, padding-free fine-tuning of language models in JAX.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help tables cut the names of long flags
)
app.command()(train)
app.command()(inspect)
app.command()(generate)
app.command()(export)
app.command()(bench)
app.command()(demo)


def main() -> None:
    """Runs a command.

    Bad input ends with one sentence and status 2, and Ctrl-C with status 130 (by typer). A bug in jaxpack keeps its
    traceback.
    """
    try:
        app()
    except InputError as error:
        console.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
        sys.exit(2)
