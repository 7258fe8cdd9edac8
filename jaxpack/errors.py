"""The one error a user can cause."""

import contextlib
from collections.abc import Iterator


class InputError(ValueError):
    """What was given cannot be done as asked.

    The message names the argument, the rule and the value received. The command line prints it and exits with status 2;
    any other exception is a fault of jaxpack and keeps its traceback.
    """


def check_type(name: str, value: object, kind: type) -> None:
    """Refuses what is of another type than the argument has to be: a model of another library, say."""
    if not isinstance(value, kind):
        raise InputError(f"`{name}` must be a jaxpack.{kind.__name__}, got {type(value).__name__}.")


def reason(error: BaseException) -> str:
    """What another library says is wrong, as the end of a sentence of ours: on one line, without its full stop."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".")


@contextlib.contextmanager
def errors_name(**given: str) -> Iterator[None]:
    """Has errors within name what a user gave (a flag, an argument) in place of the arguments that this became."""
    try:
        yield
    except InputError as error:
        message = str(error)
        for argument, name in given.items():
            message = message.replace(f"`{argument}`", f"`{name}`")
        error.args = (message,)
        raise
