"""Uploads a folder to the Hugging Face hub, without the names of this machine's folders."""

import json
import os
from pathlib import Path
from typing import Any

from jaxpack.errors import InputError, not_installed, reason
from jaxpack.utils.console import console
from jaxpack.utils.json_file import read_json
from torch_bridge.model_card import without_folders

_NAMES_OF_BASES = ("base_model_name_or_path", "_name_or_path", "name_or_path")  # in files that end in config.json
_LEFT_OUT = (".git", ".cache")  # folders that the hub does not take


def push_to_hub(folder: str | Path, repo_id: str, private: bool | None = None) -> str:
    """Uploads all files of a folder to a model repository on the Hugging Face hub in one commit, and returns its URL.

    The folder is that of `save_adapter`, `save_merged` or `save_pretrained`, or any other. The repository is made if
    there is none; files in it that the folder does not have stay. Where a configuration names the base model by a
    folder of this machine, the uploaded copy has only the folder's last part, and this is printed.

    The token is that of huggingface_hub: HF_TOKEN, or the one that `hf auth login` saved. HF_ENDPOINT may name another
    hub. In a run of several processes, the first one alone calls it.

    Args:
      folder: the folder to upload, with the folders in it.
      repo_id: "namespace/name"; a name alone belongs to the user of the token.
      private: whether a new repository is private; None leaves it to the settings of its owner.

    Raises:
      InputError: `folder` is no folder with files, `repo_id` is not well formed, huggingface_hub is not installed,
        there is no token that may write, or the upload failed. The folder is never changed.

    Example:
      >>> import jaxpack, torch_bridge
      >>> try:
      ...     url = torch_bridge.push_to_hub("out/adapter", "my name/my-adapter")
      ... except jaxpack.InputError as error:
      ...     print(str(error)[:66])
      `repo_id` must be the name of a repository, such as 'user/adapter'
    """
    _check_id(repo_id)
    contents = {name: _content(path) for name, path in _files(Path(folder)).items()}
    try:
        full_id = check_hub(repo_id)
        from huggingface_hub import CommitOperationAdd

        api = _api()
        api.create_repo(full_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=held) for name, held in contents.items()]
        api.create_commit(full_id, operations, commit_message="Upload with jaxpack")
    except Exception as error:  # The library raises errors of many kinds.
        why = reason(error) if error.__cause__ is None else f"{reason(error)}: {reason(error.__cause__)}"
        said = f"`repo_id` must be a repository that can be uploaded to, got {repo_id!r}: {why:.500}."
        more = "" if private is None else f", private={private}"
        raise InputError(
            f"{error if isinstance(error, InputError) else said} Nothing is lost: the files lie in {str(folder)!r}, and"
            f" `torch_bridge.push_to_hub({str(folder)!r}, {repo_id!r}{more})` uploads them again."
        ) from error
    return f"{api.endpoint}/{full_id}"


def check_hub(repo_id: str) -> str:
    """Returns the full id of a repository, "namespace/name", once the hub has said whose token there is.

    Raises:
      InputError: the id is not well formed, huggingface_hub is not installed, or there is no token that may write.
    """
    _check_id(repo_id)
    from huggingface_hub.errors import LocalTokenNotFoundError

    login = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write."
    api = _api()
    try:
        user: dict[str, Any] = api.whoami()
    except LocalTokenNotFoundError as error:
        raise InputError(f"An upload to the hub needs a token, got none. {login}") from error
    except Exception as error:  # The library raises errors of many kinds.
        answer = f"got this answer of {api.endpoint}: {reason(error):.300}"
        raise InputError(f"An upload needs a hub that knows its token, {answer}. {login}") from error
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise InputError(f"An upload to the hub needs a token that may write, got one that may only read. {login}")
    return repo_id if "/" in repo_id else f"{user['name']}/{repo_id}"


def _check_id(repo_id: str) -> None:
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError as error:
        raise not_installed("An upload to the hub", "huggingface_hub", "hf") from error
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise InputError(
            f"`repo_id` must be the name of a repository, such as 'user/adapter', got {repo_id!r:.200}:"
            f" {reason(error):.300}."
        ) from error


def _api() -> Any:
    from huggingface_hub import HfApi

    # The library reads the variable when it is imported, which may be earlier.
    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="jaxpack")


def _files(folder: Path) -> dict[str, Path]:
    """Returns the files of a folder by their paths in a repository."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in files.items() if not set(_LEFT_OUT) & set(name.split("/"))}
    if not files:
        raise InputError(f"`folder` must be a folder with files to upload, got {str(folder)!r:.200}.")
    return files


def _content(path: Path) -> Path | bytes:
    """Returns the path of a file, or other content that is to be uploaded in its place."""
    if not path.name.endswith("config.json"):
        return path
    fields = read_json(path)
    names = {name: fields[name] for name in _NAMES_OF_BASES if isinstance(fields.get(name), str)}
    changed = {name: short for name, value in names.items() if (short := without_folders(value)) != value}
    for name, short in changed.items():
        console.print(
            f"{path.name} is uploaded with {short!r} as its {name}, because {names[name]!r} is a folder of yours."
            " Others need the id of the base model on the hub there",
            style="yellow",
        )
    return json.dumps(fields | changed, indent=2, sort_keys=True).encode() + b"\n" if changed else path
