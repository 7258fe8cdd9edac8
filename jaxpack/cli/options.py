"""Command-line flags from configuration dataclasses, so that a field, its default and its meaning are written once."""

import dataclasses
import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer

from jaxpack.errors import errors_name
from jaxpack.settings import GenerateConfig, LoraConfig, TrainConfig

Config = TypeVar("Config", TrainConfig, LoraConfig, GenerateConfig)

FLAG_OF = {"r": "lora_r"}  # where a field's name says too little outside its class


def with_flags(*configs: type[Config], leave_out: tuple[str, ...] = ()) -> Callable[[Callable], Callable]:
    """Appends a flag for every field of the dataclasses to a command, which receives them in `**flags`.

    A field that two of them have, such as `seed`, is one flag that sets both.
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
    """The name under which a command receives a field."""
    return FLAG_OF.get(field.name, field.name)


def from_flags(config: type[Config], flags: dict[str, Any], **given: Any) -> Config:
    """The dataclass that the flags of a command describe; `given` are the fields that have none."""
    values = {field.name: flags.get(flag_of(field)) for field in dataclasses.fields(config)}
    with errors_name(**FLAG_OF):
        return config(**{name: value for name, value in values.items() if value is not None} | given)


LORA_FLAGS = [flag_of(field) for field in dataclasses.fields(LoraConfig) if field.name != "seed"]  # a run has one too


def asks_for_adapter(flags: dict[str, Any]) -> bool:
    """Whether flags of a new adapter are among those that were given."""
    return any(flags.get(name) is not None for name in LORA_FLAGS)


def to_flags(config: TrainConfig | LoraConfig) -> dict[str, Any]:
    """The flags that make the dataclass, with lists and mappings as a settings file has them."""
    values = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, tuple):
            value = dict(value) if any(map(is_pairs, get_args(field.type))) else list(value)
        values[flag_of(field)] = value
    return values


def is_pairs(kind: Any) -> bool:
    """Whether a field's type is that of pairs, which a settings file has as a mapping."""
    return get_origin(kind) is tuple and get_origin(get_args(kind)[0]) is tuple


def _parameter(field: dataclasses.Field) -> inspect.Parameter:
    name = flag_of(field)
    flag = f"--{name.replace('_', '-')}"
    kind = field.type
    if get_origin(kind) in (UnionType, Union):
        kind = next(one for one in get_args(kind) if one is not NoneType)  # not given, a flag is None
    if get_origin(kind) is not Literal and kind not in (int, float, bool):
        kind = str
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if kind is bool else flag,
        help=field.metadata["help"],
        show_default=str(field.default),
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option, field]
    )
