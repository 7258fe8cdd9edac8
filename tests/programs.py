"""Reads the equations of a traced program."""

from typing import Any

import jax


def equations(jaxpr: Any) -> list[Any]:
    """Returns all equations of a jaxpr; those of an inner jaxpr count once for each equation that holds it."""
    found = []
    for equation in jaxpr.eqns:
        found.append(equation)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                found += equations(getattr(inner, "jaxpr", inner))
    return found
