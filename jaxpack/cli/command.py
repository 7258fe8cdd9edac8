"""Defines how a command reads its flags: in any spelling, with TRL's names, and with an answer to unknown ones."""

import re
from collections.abc import Iterable
from typing import Any

from jaxpack.cli.help import HelpfulCommand
from jaxpack.cli.options import LIST_FLAGS
from jaxpack.errors import InputError
from jaxpack.utils.foreign_names import ALIASES, OPPOSITES, hint, listed

_OF_TRAINING = ("train", "evaluate", "inspect")  # the commands that have flags of TRL's
_TRUTHS = {"true": True, "false": False}


class Command(HelpfulCommand):
    """Reads flags with underscores or dashes, and as users of TRL write them.

    `--lora_target_modules q_proj v_proj` is `--target-modules q_proj,v_proj`, and `--packing True` is `--packing`.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parses the words of a command line, once each flag has the name and the form that typer knows."""
        return super().parse_args(ctx, self._as_known(list(args), self.get_params(ctx)))

    def _as_known(self, words: list[str], parameters: Iterable[Any]) -> list[str]:
        """Returns the words with the flags' own names, or refuses all unknown flags in one sentence."""
        flags = {flag: one for one in parameters for flag in (*one.opts, *one.secondary_opts)}
        names = {flag[2:].replace("-", "_") for flag in flags}
        known, unknown = [], []
        while words:
            word = words.pop(0)
            if not word.startswith("--"):
                known.append(word)
                continue
            written, has_value, value = word.partition("=")
            words[:0] = [value] if has_value else []
            name, is_opposite = _own_name(written, names)
            flag = f"--{name.replace('_', '-')}"
            if flag not in flags:
                answer = hint(written[2:], names, is_of_training=self.name in _OF_TRAINING)
                unknown.append(f"`{written}`{_as_flags(answer, names)}")
                _values(words)
            elif flags[flag].is_flag:
                if words and words[0].lower() in _TRUTHS:
                    is_opposite ^= not _TRUTHS[words.pop(0).lower()]
                on = (flag in flags[flag].opts) ^ is_opposite
                known += (flags[flag].opts if on else flags[flag].secondary_opts)[:1]
            else:
                values = [words.pop(0)] if words else []
                if values and name in LIST_FLAGS:
                    values = [",".join(values + _values(words))]
                known += [flag, *values]
        if unknown:
            raise InputError(f"`jaxpack {self.name}` has no {listed('flag', unknown)}.")
        return known


def _own_name(written: str, names: set[str]) -> tuple[str, bool]:
    """Returns the name of a flag with underscores, and whether the flag as written stands for the opposite."""
    name = written[2:].replace("-", "_")
    if name in names:
        return name, False
    return ALIASES.get(name, OPPOSITES.get(name, name)), name in OPPOSITES


def _as_flags(text: str, names: set[str]) -> str:
    """Writes the names of flags in a text as they are typed: `max_length` is `--max-length`."""

    def typed(found: re.Match[str]) -> str:
        name, value = found.groups(default="")
        return f"`--{name.replace('_', '-')}{value.replace('=', ' ')}`" if name in names else found[0]

    return re.sub(r"`(\w+)(=[^`]*)?`", typed, text)


def _values(words: list[str]) -> list[str]:
    """Takes the words up to the next flag."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    values, words[:count] = words[:count], []
    return values
