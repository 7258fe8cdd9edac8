"""Defines `InputError`, the error that a user can cause, `TrainingError`, and helpers for their messages."""

import contextlib
from collections.abc import Iterator

# Control characters of ASCII have signs of their own in Unicode. Others, and those that change the direction of text or
# begin a line, become the replacement character.
_SIGNS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
_SIGNS |= dict.fromkeys([*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)


def visible(text: str) -> str:
    """Replaces control characters by visible signs, so that text from a file cannot control a terminal.

    Newlines and tabs stay.

    Example:
      >>> visible("red: \\x1b[31m")
      'red: ␛[31m'
    """
    return text.translate(_SIGNS)


def one_line(text: str) -> str:
    """Replaces control characters as `visible` does, and newlines, so that a text cannot pretend to be several lines.

    Example:
      >>> one_line("a name\\nsaved out/adapter")
      'a name␊saved out/adapter'
    """
    return visible(text).replace("\n", "␊")


class InputError(ValueError):
    """Says that an argument, a setting or a file of the user cannot be used as given.

    The message names the argument, the rule and the value received. The command line prints it and exits with status 2;
    any other exception is a fault of jaxpack and keeps its traceback. Messages are one line, and control characters in
    them, which names and texts in files may have, become visible signs.

    Example:
      >>> import jaxpack
      >>> try:
      ...     jaxpack.TrainConfig(max_length=1)
      ... except jaxpack.InputError as error:
      ...     print(error)
      `max_length` must be at least 2 (one token to read, one to predict), got 1.
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


class TrainingError(RuntimeError):
    """Says that a run cannot go on although its input was right, such as when its weights are no longer finite.

    The message says in which step, what was saved, and what usually helps. The command line prints it and exits with
    status 1.

    Example:
      >>> import jaxpack
      >>> issubclass(jaxpack.TrainingError, RuntimeError)
      True
    """

    def __init__(self, message: str = ""):
        super().__init__(one_line(message))


def check_type(name: str, value: object, kind: type) -> None:
    """Refuses a value of another type than the argument must have, such as a model of another library."""
    if not isinstance(value, kind):
        raise InputError(f"`{name}` must be a jaxpack.{kind.__name__}, got {type(value).__name__}.")


def install_command(extras: str) -> str:
    """Returns the command that installs optional dependencies, from a checkout or else from a package index.

    Args:
      extras: names of extras in `pyproject.toml`, with commas between them.

    Example:
      >>> print(install_command("hf,torch"))
      `pip install -e '.[hf,torch]'` in jaxpack's repository (or `pip install 'jaxpack[hf,torch]'` from a package index)
    """
    return (
        f"`pip install -e '.[{extras}]'` in jaxpack's repository "
        f"(or `pip install 'jaxpack[{extras}]'` from a package index)"
    )


def not_installed(what: str, package: str, extras: str) -> InputError:
    """Returns the error of an argument or a command that needs a package which is not installed.

    Args:
      what: the words that begin the message, such as "`verify`".
      package: the package that is missing.
      extras: the extras that install it, see `install_command`.
    """
    return InputError(
        f"{what} needs the Python package {package}, which is not installed. Install it with {install_command(extras)}."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error says that the memory of a device of JAX is exhausted."""
    return type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and "RESOURCE_EXHAUSTED" in str(error)


def reason(error: BaseException) -> str:
    """Returns the message of another library's error on one line without its full stop, to end a sentence of ours."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")


@contextlib.contextmanager
def errors_name(**given: str) -> Iterator[None]:
    """Renames arguments in the messages of errors raised inside to what the user gave, such as a flag.

    `given` maps the name of an argument to the name that the user knows.
    """
    try:
        yield
    except InputError as error:
        message = str(error)
        for argument, name in given.items():
            message = message.replace(f"`{argument}`", f"`{name}`")
        error.args = (message,)
        raise
