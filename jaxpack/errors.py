"""The one error a user can cause."""


class InputError(ValueError):
    """What was given cannot be done as asked.

    The message is one sentence that names the argument, the rule and the value received. The command line prints it
    and exits with status 2; any other exception is a fault of jaxpack and keeps its traceback.
    """
