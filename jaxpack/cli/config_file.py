"""Reads the flags of a command from a YAML or TOML settings file, and writes one for a rerun."""

import inspect
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
import yaml
from yaml.composer import ComposerError

from jaxpack.cli.options import NONE, NUMBER_OR_NONE, is_pairs
from jaxpack.errors import InputError, reason
from jaxpack.utils.files import replace_file
from jaxpack.utils.foreign_names import ALIASES, OPPOSITES, hint

_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text", NoneType: "null"}
_LISTED = {str: "text", int: "whole numbers"}
_TEXTS = list[str]  # a flag that may be given several times: in a file, one text or a list
_TYPES = {bool: (bool,), int: (int,), float: (int, float), str: (str,), Path: (str,), NoneType: (NoneType,)}


RUN_SETTINGS = "run.yaml"  # the settings of a run, in its output folder


def read_settings(path: Path, command: Callable) -> dict[str, Any]:
    """Reads a command's flags from a file, each value as a user would type it; names may be TRL's, and have dashes.

    `null` means not given, or None for a number whose default is another one.

    Raises:
      InputError: the file cannot be read, is empty, or holds an unknown name or a value of the wrong type.
    """
    kinds = _kinds(command)
    found = _by_own_names(_parse(path), kinds, path)
    unknown = [f"{name!r}{hint(str(name), kinds)}" for name in found if name not in kinds]
    if unknown:
        raise InputError(f"`config` must hold names of the command's flags, got {', '.join(unknown)} in {str(path)!r}.")
    for name, value in found.items():
        if not _fits(kinds[name], value):
            raise InputError(f"`{name}` must be {_rule(kinds[name])}, got {value!r} in {str(path)!r}.")
    found |= {name: NONE for name, value in found.items() if value is None and name in NUMBER_OR_NONE}
    return {name: _typed(kinds[name], value) for name, value in found.items() if value is not None}


def says_4bit(path: Path) -> bool:
    """Returns whether a run's settings say that its weights were loaded in 4 bits; False if there is no such file."""
    try:
        settings = _parse(path) if path.is_file() else {}
    except InputError:  # perhaps the file of another program
        return False
    return settings.get("load_in_4bit") is True


def write_settings(path: Path, settings: dict[str, Any]) -> None:
    """Writes flags and their values to a YAML file that `read_settings` reads."""
    head = "# `jaxpack train --config THIS_FILE --output NEW_FOLDER` repeats the run; flags override these values.\n"
    text = yaml.dump(settings, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True)
    replace_file(path, (head + text).encode(), "output")


def overridden(context: typer.Context, alternatives: list[list[str]]) -> set[str]:
    """Returns the flags of a settings file that yield, since the command line chose another alternative."""

    def come_from(source: str, names: list[str]) -> list[str]:
        sources = {name: context.get_parameter_source(name) for name in names}
        return [name for name, found in sources.items() if found is not None and found.name == source]

    taken = [names for names in alternatives if any(context.params[name] for name in come_from("COMMANDLINE", names))]
    others = [names for names in alternatives if taken and names not in taken]
    return {name for names in others for name in come_from("DEFAULT_MAP", names)}


def _by_own_names(found: dict[Any, Any], kinds: dict[str, Any], path: Path) -> dict[Any, Any]:
    """Returns the values by the names of the command's flags; an unknown name stays as it is."""
    own: dict[Any, Any] = {}
    written: dict[Any, Any] = {}
    for name, value in found.items():
        same = str(name).replace("-", "_")
        ours = same if same in kinds else ALIASES.get(same, OPPOSITES.get(same))
        if ours not in kinds:
            ours = name
        elif same in OPPOSITES:
            if type(value) is not bool:
                raise InputError(f"`{same}` must be true or false, got {value!r} in {str(path)!r}.")
            value = not value
        if ours in own:
            raise InputError(
                f"`config` must hold each setting once, got {written[ours]!r} and {name!r}, which are the same, in"
                f" {str(path)!r}."
            )
        own[ours], written[ours] = value, name
    return own


# Types of the values in a file.


def _kinds(command: Callable) -> dict[str, Any]:
    """Returns the type of each flag's value: the type of its dataclass field, if it sets one."""
    kinds = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if get_args(parameter.annotation):
            kind, option, *field = get_args(parameter.annotation)
            if not option.is_eager:  # only `--config` itself is eager
                kinds[name] = field[0].type if field else kind
    return kinds


def _alternatives(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (UnionType, Union) else (kind,)


def _fits(kind: Any, value: Any) -> bool:
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            fits = value in get_args(one)
        elif is_pairs(one):
            fits = isinstance(value, dict)
        elif one == _TEXTS:
            texts = value if isinstance(value, list) else [value]
            fits = bool(texts) and all(isinstance(item, str) for item in texts)
        elif get_origin(one) is tuple:
            items = (str, *_items(one))
            fits = isinstance(value, list) and all(type(item) in items for item in value)
        else:
            fits = type(value) in _TYPES[one]
        if fits:
            return True
    return False


def _items(kind: Any) -> tuple[Any, ...]:
    """Returns the type of the items of a tuple type, such as (int,) for `tuple[int, ...]`."""
    return get_args(kind)[:1]


def _rule(kind: Any) -> str:
    rules = []
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            rules.append(f"one of {get_args(one)}")
        elif one == _TEXTS:
            rules.append("text or a list of text")
        elif get_origin(one) is tuple:
            rules.append("a mapping" if is_pairs(one) else f"a list of {_LISTED[_items(one)[0]]}")
        else:
            rules.append(_RULES[one])
    return " or ".join(rules)


def _typed(kind: Any, value: Any) -> Any:
    if Path in _alternatives(kind):
        return str(Path(value).expanduser())  # a shell would expand `~`
    if _TEXTS in _alternatives(kind):
        return [os.path.expanduser(item) for item in (value if isinstance(value, list) else [value])]
    if isinstance(value, dict):
        return ",".join(f"{name}={one}" for name, one in value.items())
    return ",".join(map(str, value)) if isinstance(value, list) else value


# YAML and TOML.


def _parse(path: Path) -> dict[Any, Any]:
    if path.suffix not in (".yaml", ".yml", ".toml"):
        raise InputError(f"`config` must end in .yaml, .yml or .toml, got {str(path)!r}.")
    try:
        text = path.read_text("utf-8-sig")
        found = tomllib.loads(text) if path.suffix == ".toml" else yaml.load(text, _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"`config` must be a YAML or TOML file, got {str(path)!r}: {reason(error)}.") from error
    if not isinstance(found, dict) or not found:
        held = "nothing" if not found else f"{found!r:.80}"
        rule = "must hold names of flags with their values, such as max_length: 4096"
        raise InputError(f"`config` {rule}, got {str(path)!r} with {held}.")
    return found


class _Loader(yaml.SafeLoader):
    """Refuses names that occur twice, and aliases; reads numbers as in YAML 1.2 (2e-4 is one), and dates as text."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # with a few of these, a short file has billions of values
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "an alias is not allowed", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                message = "a name must be text (text with braces in it needs quotes)"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            if key.value in names:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            names.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes text that this loader or another YAML reader would not read as text."""


_FLOAT, _DATE = (f"tag:yaml.org,2002:{kind}" for kind in ("float", "timestamp"))
_NUMBER = re.compile(r"(?i:[-+]?(\.\d+|\d+(\.\d*)?)(e[-+]?\d+)?|[-+]?\.inf|\.nan)$", re.ASCII)
_Loader.yaml_implicit_resolvers = {
    first: [resolver for resolver in resolvers if resolver[0] != _DATE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(_FLOAT, _NUMBER, list("-+.0123456789"))
