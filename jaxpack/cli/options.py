"""Makes command-line flags from dataclasses, so that a field, its default and its help are written once."""

import dataclasses
import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from jaxpack.errors import errors_name
from jaxpack.settings import GenerateConfig, LoraConfig, TrainConfig

Configs = TrainConfig | LoraConfig | GenerateConfig
Config = TypeVar("Config", bound=Configs)

FLAG_OF = {"r": "lora_r"}  # field names that say too little outside their class


def with_flags(*configs: type[Configs], leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Appends a flag for every field of the dataclasses to a command, which receives them in `**flags`.

    If two dataclasses have the same field, such as `seed`, one flag sets both.
    """

    def extend(command: Callable) -> Callable:
        parameters = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for config in configs:
            for field in dataclasses.fields(config):
                parameter = _parameter(field)
                if field.name not in leave_out and parameter.name not in {p.name for p in parameters}:
                    parameters.append(parameter)
        command.__signature__ = inspect.Signature(parameters)
        return command

    return extend


def flag_of(field: dataclasses.Field) -> str:
    """Returns the name under which a command receives a field."""
    return FLAG_OF.get(field.name, field.name)


def from_flags(config: type[Config], flags: dict[str, Any], **given: Any) -> Config:
    """Builds a dataclass from the flags of a command; `given` are the fields without a flag."""
    values = {field.name: flags.get(flag_of(field)) for field in dataclasses.fields(config)}
    values = {name: value for name, value in values.items() if value is not None}
    values |= {name: None for name, value in values.items() if name in NUMBER_OR_NONE and value == NONE}
    with errors_name(**FLAG_OF):
        return config(**values | given)


_FIELDS = [field for config in (TrainConfig, LoraConfig, GenerateConfig) for field in dataclasses.fields(config)]
LORA_FLAGS = [flag_of(field) for field in dataclasses.fields(LoraConfig) if field.name != "seed"]  # also a run's flag
LIST_FLAGS = {flag_of(field) for field in _FIELDS if any(get_origin(kind) is tuple for kind in get_args(field.type))}
NONE = "none"  # None on the command line, for a number whose default is another one: a flag that is not given is None
_WITH_LINE_BREAKS = ("instruction_part", "response_part")  # flags in whose values `\n` is a line break
NUMBER_OR_NONE = {flag_of(field) for field in _FIELDS if field.type == int | None and field.default is not None}


def asks_for_adapter(flags: dict[str, Any]) -> bool:
    """Returns whether the user gave any flag of a new adapter."""
    return any(flags.get(name) is not None for name in LORA_FLAGS)


def to_flags(config: TrainConfig | LoraConfig) -> dict[str, Any]:
    """Returns the flags that make the dataclass, with lists and mappings as in a settings file."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            value = dict(value) if any(map(is_pairs, get_args(field.type))) else list(value)
        values[flag_of(field)] = value
    return values


def is_pairs(kind: Any) -> bool:
    """Returns whether a field's type is a tuple of pairs, which is a mapping in a settings file."""
    return get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is tuple


def _parameter(field: dataclasses.Field) -> inspect.Parameter:
    name = flag_of(field)
    flag = f"--{name.replace('_', '-')}"
    kind = field.type
    if get_origin(kind) in (UnionType, Union):
        kind = next(one for one in get_args(kind) if one is not NoneType)  # a flag that is not given is None
    if get_origin(kind) is not Literal and kind not in (int, float, bool):
        kind = str
    parser = _number_or_none if name in NUMBER_OR_NONE else _with_line_breaks if name in _WITH_LINE_BREAKS else None
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=field.metadata["help"],
        show_default=str(field.default),
        parser=parser,
        metavar={_number_or_none: "INTEGER|none", _with_line_breaks: "TEXT"}.get(parser),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option, field]
    )


def _number_or_none(value: Any) -> int | str:
    if str(value).lower() == NONE:
        return NONE
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither a whole number nor {NONE}.") from None


def _with_line_breaks(value: Any) -> str:
    """Returns a text in which `\\n` and `\\t`, which a shell leaves as they are, are a line break and a tab."""
    return str(value).replace("\\n", "\n").replace("\\t", "\t")
