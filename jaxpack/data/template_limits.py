"""Bounds what a chat template may do: it is a program of somebody else, which transformers runs in jinja's sandbox.

The sandbox keeps a template from everything but its messages. It does not bound time or memory: loops within loops
never end, and `'a' * 10**10` fills the memory with one operation. Here, operations that can make much of little are
bounded, and a watching thread ends the rest.
"""

import contextlib
import functools
import re
import string
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from jaxpack.utils.time_limit import Limit

_MAX_TEMPLATE = 1 << 20  # characters, forty times the longest template in use
_SECONDS, _MEMORY = 10.0, 1 << 30  # for one conversation; the slowest template in use takes 20 ms
_MAX_TEXT = 16 << 20  # characters of a text, or items of a list
_MAX_PARTS = 1_000_000  # of lists within lists
_MAX_NUMBER = 100_000  # of a width, a count or a precision
_MAX_BITS = 10_000  # of a whole number
_BOUNDED = frozenset(("+", "*", "**", "%"))
_WIDE = re.compile(r"%[^%a-zA-Z]*(\d{6}|\*)")  # a format with a width that is huge, or is given with the values
_WIDE_FIELD = re.compile(r"\d{6}|\{")  # the same in the format of a field in braces
_REFUSED_METHODS = ("translate", "maketrans", "expandtabs")  # no template needs these, which make much of little
_REFUSED_FILTERS = ("urlize", "wordwrap", "xmlattr")
_limit = Limit(_SECONDS, _MEMORY)
_ended: dict[str, str] = {}  # templates that reached a limit, and which


@contextlib.contextmanager
def limited(template: str) -> Iterator[None]:
    """Bounds what transformers does with a chat template in the block.

    Raises:
      TimeoutError: the template took longer than 10 seconds, or a GiB of memory, now or before: it is not tried again.
      ValueError: the template is too long.
    """
    _install()
    if template in _ended:
        raise TimeoutError(_ended[template])
    if len(template) > _MAX_TEMPLATE:
        raise ValueError(f"it has {len(template):,} characters, which is more than {_MAX_TEMPLATE:,}")
    try:
        with _limit.watch():
            yield
    except TimeoutError as error:
        _ended[template] = str(error)
        raise


@functools.cache
def _install() -> None:
    """Lets transformers compile chat templates with the bounded environment, from now on."""
    try:
        import jinja2
        from jinja2 import compiler, sandbox
        from transformers.utils import chat_template_utils
    except ImportError:  # then no template runs
        return

    class BoundedTemplate(jinja2.Template):
        def generate(self, *args: Any, **options: Any) -> Iterator[str]:
            size = 0
            for text in super().generate(*args, **options):
                size += len(text)
                _require(size <= _MAX_TEXT, "a text", size)
                yield text

    class BoundedGenerator(compiler.CodeGenerator):
        def visit_Concat(self, node: Any, frame: Any) -> None:
            if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
                raise OverflowError("it escapes HTML, which no chat template needs")
            self.write("environment.join_texts((")
            for item in node.nodes:
                self.visit(item, frame)
                self.write(", ")
            self.write("))")

    class BoundedEnvironment(sandbox.ImmutableSandboxedEnvironment):
        template_class = BoundedTemplate
        code_generator_class = BoundedGenerator
        intercepted_binops = _BOUNDED
        concat = staticmethod(_concat)

        def join_texts(self, items: tuple) -> str:
            return _concat([item if isinstance(item, str) else str(_written(item)) for item in items])

        def from_string(self, source: Any, *args: Any, **options: Any) -> Any:
            for name in _REFUSED_FILTERS:
                self.filters.pop(name, None)
            self.globals.pop("lipsum", None)
            self.finalize = _written
            for name, bound in _FILTERS.items():
                if name in self.filters:
                    self.filters[name] = _bounded_filter(self.filters[name], bound)
            return super().from_string(source, *args, **options)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
            _check_call(__obj, args, options)
            return super().call(__context, __obj, *args, **options)

        def wrap_str_format(self, value: Any) -> Any:
            wrapped = super().wrap_str_format(value)
            if wrapped is not None:
                fields = string.Formatter().parse(value.__self__)
                _require_narrow(not any(_WIDE_FIELD.search(form or "") for _, _, form, _ in fields))
            return wrapped

    utils: Any = chat_template_utils
    utils.ImmutableSandboxedEnvironment = BoundedEnvironment
    utils._compile_jinja_template.cache_clear()  # templates that were compiled without bounds


def _require(is_bounded: bool, what: str, size: object) -> None:
    if not is_bounded:
        raise OverflowError(f"it makes {what} of {size:,}, which is more than a chat template needs")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple | dict) else 0


def _concat(parts: Iterable[str]) -> str:
    parts = list(parts)
    _require((size := sum(map(len, parts))) <= _MAX_TEXT, "a text", size)
    return "".join(parts)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    if operator == "+":
        if isinstance(left, str | list | tuple) and type(left) is type(right):
            _require((size := len(left) + len(right)) <= _MAX_TEXT, "a text or a list", size)
        return
    if operator == "%":
        if isinstance(left, str | bytes):
            _check_format(left)
        return
    for items, count in ((left, right), (right, left)):
        if isinstance(count, int) and not isinstance(items, int | float):
            _require((size := _length(items) * count) <= _MAX_TEXT, "a text or a list", size)
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        _require(bits <= _MAX_BITS, "a number of bits", bits)


def _check_format(text: str | bytes) -> None:
    _require_narrow(_WIDE.search(text.decode("latin1") if isinstance(text, bytes) else text) is None)


def _require_narrow(is_narrow: bool) -> None:
    if not is_narrow:
        raise OverflowError("it formats with a width that is more than a chat template needs")


def _check_call(called: Any, args: tuple, options: dict[str, Any]) -> None:
    for value in (*args, *options.values()) if options else args:
        if type(value) is int:
            _require(-_MAX_NUMBER <= value <= _MAX_NUMBER, "a count", value)
    text = getattr(called, "__self__", None)
    if isinstance(text, str | bytes):
        name = called.__name__
        if name in _REFUSED_METHODS:
            raise OverflowError(f"it calls `{name}` of a text, which no chat template needs")
        if name == "replace" and len(args) > 1:
            _check_replace(text, *args[:2])
        elif name == "join" and args:
            _check_join(args[0], text)


def _check_replace(text: Any, old: Any, new: Any, *_: Any) -> None:
    if _length(new) > _length(old):
        size = _length(text) + (text.count(old) if old else len(text) + 1) * _length(new)
        _require(size <= _MAX_TEXT, "a text", size)


def _check_join(items: Any, between: Any = "", *_: Any) -> None:
    if isinstance(items, list | tuple):
        size = sum(map(_length, items)) + len(items) * _length(between)
        _require(size <= _MAX_TEXT, "a text", size)


def _written(value: Any) -> Any:
    """Returns a value that a template writes, unless it is far longer when it is written."""
    if isinstance(value, list | tuple | dict):
        _check_nested(value)
    return value


def _check_nested(value: Any, *_: Any, **__: Any) -> None:
    """Refuses lists that hold the same list many times, in many levels: their text is far longer than they are."""
    waiting, parts, size = [value], 0, 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
            parts += len(item)
        elif isinstance(item, list | tuple):
            waiting += item
            parts += len(item)
        elif isinstance(item, str):
            size += len(item)
        _require(parts <= _MAX_PARTS and size <= _MAX_TEXT, "a text", max(parts, size))


def _check_widths(value: Any, *args: Any, **options: Any) -> None:
    numbers = [one for one in (*args, *options.values()) if isinstance(one, int)]
    _require(max(map(abs, numbers), default=0) <= _MAX_NUMBER, "a width", max(numbers, default=0))
    lines = value.count("\n") + 1 if isinstance(value, str) else 1
    widest = max([*map(abs, numbers), *(len(one) for one in (*args, *options.values()) if isinstance(one, str))] or [0])
    _require(lines * widest <= _MAX_TEXT, "a text", lines * widest)
    _check_nested(value)


def _check_format_filter(value: Any, *_: Any, **__: Any) -> None:
    _check_format(str(value))


# The checks of filters that can make much of little, by their arguments.
_FILTERS: dict[str, Callable[..., None]] = {
    "batch": _check_widths,
    "center": _check_widths,
    "format": _check_format_filter,
    "indent": _check_widths,
    "join": _check_join,
    "replace": _check_replace,
    "slice": _check_widths,
    "string": _check_nested,
    "tojson": _check_widths,
    "pprint": _check_nested,
}


def _bounded_filter(run: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    first = 1 if hasattr(run, "jinja_pass_arg") else 0  # jinja gives some filters its own context first

    @functools.wraps(run)  # copies jinja's mark, too
    def bounded(*args: Any, **options: Any) -> Any:
        given = list(args)
        if check is _check_join and len(given) > first and not isinstance(given[first], str | list | tuple):
            given[first] = list(given[first])  # a generator can be read only once
        check(*given[first:], **options)
        return run(*given, **options)

    return bounded
