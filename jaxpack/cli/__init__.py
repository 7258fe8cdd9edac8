"""Defines the commands of `jaxpack`, which are listed in `COMMANDS`. May import torch_bridge."""

import importlib
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import jaxpack
from jaxpack.cli.help import MAX_WIDTH
from jaxpack.constants import HOST_FRACTION, MEMORY_FRACTION, PINNED_GIB, PINNED_LIMIT
from jaxpack.errors import InputError, TrainingError, is_out_of_memory, reason
from jaxpack.utils.console import console, make_output_visible
from jaxpack.utils.host import available_host_bytes

# Each command is the function of its name in the module of its name. The lines are those of `jaxpack --help`.
COMMANDS = {
    "train": "Fine-tune a model; write an adapter or the trained model.",
    "evaluate": "Compute the loss of a model or an adapter on a dataset.",
    "inspect": "Show what padding costs on a dataset, and what packing gains.",
    "generate": "Generate text from a model, with or without an adapter.",
    "export": "Merge an adapter into its base; write a folder or a GGUF file.",
    "bench": "Measure tokens a second and peak memory on this device.",
    "demo": "Fine-tune a small model on bundled questions; works offline.",
}


class LazyGroup(TyperGroup):
    """Imports the module of a command when the command is chosen, so that `jaxpack --help` does not import jax."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.commands = dict.fromkeys(COMMANDS)  # None: not imported yet

    def get_command(self, ctx: typer.Context, cmd_name: str) -> Any:
        """Returns the command, or None if there is none of that name."""
        if cmd_name in COMMANDS and self.commands[cmd_name] is None:
            from jaxpack.cli.command import Command

            single = typer.Typer(add_completion=False, rich_markup_mode=None)
            single.command(cmd_name, cls=Command)(getattr(importlib.import_module(f"jaxpack.cli.{cmd_name}"), cmd_name))
            self.commands[cmd_name] = typer.main.get_command(single)
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: typer.Context, formatter: Any) -> None:
        """Writes the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


app = typer.Typer(
    cls=LazyGroup,
    help="Fine-tune language models in JAX on NVIDIA GPUs, without spending half of the work on padding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's help tables cut the names of long flags
    # The commands inherit the names and the width.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_WIDTH},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"jaxpack {jaxpack.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Declares the options that come before a command."""


def _ask_for_most_of_the_memory() -> None:
    """Lets jax take more of a GPU's memory, and of the host's, than by default, unless the user has set how much."""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
    if not any(os.environ.get(name) for name in names):
        os.environ["XLA_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)
    pinned = int(HOST_FRACTION * (available_host_bytes() or 0) / 2**30)
    if pinned > PINNED_GIB and not os.environ.get(PINNED_LIMIT):
        os.environ[PINNED_LIMIT] = str(pinned)


def main() -> None:
    """Runs a command.

    Bad input and full memory end with one sentence and status 2, a run that cannot go on with one sentence and status
    1, and Ctrl-C with status 130 (by typer). A bug in jaxpack keeps its traceback.
    """
    make_output_visible()
    _ask_for_most_of_the_memory()
    try:
        app()
    except (InputError, TrainingError) as error:
        _exit(str(error), 2 if isinstance(error, InputError) else 1)
    except SystemExit as error:
        _leave_others(f"it ended with status {error.code}", error.code)
        raise
    except Exception as error:
        if not (isinstance(error, MemoryError) or is_out_of_memory(error)):
            raise
        whose = "this machine" if isinstance(error, MemoryError) else "the device"
        _exit(
            f"the memory of {whose} is full ({reason(error):.200}). Use a smaller model, `max_length` or batch, or end"
            " other programs that use this memory.",
            2,
        )


def _exit(why: str, status: int) -> NoReturn:
    console.print(f"error: {why}", style="red")
    _leave_others(why, status)
    sys.exit(status)


def _leave_others(why: str, status: Any) -> None:
    """Ends the other processes of the run, if there are some."""
    processes = sys.modules.get("jaxpack.parallel.processes")  # An error of the command line comes before any import.
    if processes is not None and status:
        processes.leave(why, status)
