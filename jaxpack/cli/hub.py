"""Uploads what a command has written to the Hugging Face hub, if its flags ask for it."""

from pathlib import Path
from typing import Annotated

import typer

import torch_bridge
from jaxpack.errors import InputError, errors_name
from jaxpack.parallel.processes import is_first_process
from jaxpack.utils.console import console
from torch_bridge.hub import check_hub

PushOption = Annotated[
    bool,
    typer.Option(
        help="Upload the written folder to the Hugging Face hub at the end. The token is HF_TOKEN, or the one that"
        " `hf auth login` saved; it is checked at the start."
    ),
]
HubIdOption = Annotated[
    str | None,
    typer.Option(
        help="Repository to upload to: namespace/name, or a name alone, which belongs to the user of the token.",
        show_default="the name of the output folder",
    ),
]
HubPrivateOption = Annotated[
    bool | None,
    typer.Option(
        "--hub-private-repo/--no-hub-private-repo",
        help="Whether a new repository on the hub is private.",
        show_default="as the settings of its owner say",
    ),
]


def check_upload(push: bool, hub_model_id: str | None, private: bool | None, output: Path) -> str | None:
    """Refuses at the start what an upload would fail of at the end, and returns the id of the repository, if any."""
    if not push:
        for name, value in (("hub_model_id", hub_model_id), ("hub_private_repo", private)):
            if value is not None:
                raise InputError(f"`{name}` must be left out without `push_to_hub`, got {value!r}.")
        return None
    if not is_first_process():
        return None
    with errors_name(repo_id="hub_model_id"):
        return check_hub(output.absolute().name if hub_model_id is None else hub_model_id)


def upload(folder: Path, repo_id: str, private: bool | None) -> None:
    """Uploads a folder, and prints where it is."""
    with errors_name(repo_id="hub_model_id"):
        url = torch_bridge.push_to_hub(folder, repo_id, private)
    console.print(f"uploaded {folder} to {url}")
