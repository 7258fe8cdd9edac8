"""Reads the docstrings and settings of jaxpack for the reference of `make docs`, as an extension of Griffe.

jaxpack writes `Example:` above its doctests, and the help text of a setting in its default, `_option(default, "help")`.
Griffe knows `Examples:`, and docstrings of attributes.
"""

import ast
import re
from typing import Any

import griffe


class HouseStyle(griffe.Extension):
    """Tells Griffe where examples and the help texts of settings are."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section of doctests, so that they are shown as code."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Splits a setting into its default and its docstring, which is its help text."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "_option":
            default, meaning = value.arguments[:2]
            attr.value = default
            attr.docstring = griffe.Docstring(ast.literal_eval(f"({meaning})"), parent=attr, lineno=attr.lineno)
