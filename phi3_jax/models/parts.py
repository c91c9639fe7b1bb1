"""The parts of a phi-3-vision that are trained or left as they are: language model, projector, tower.

The projector's part holds the two separators as well. The tower's last layer, which never runs, is no part: nothing trains
it. A model without eyes is one part, and its tree is never taken apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax

from phi3_jax.keys import PARTS, rates_of
from phi3_jax.models.spec import Tree, name_of

_PROJECTOR = ("in", "out", "row_end", "whole_end")


def part_of(name: str) -> str:
    """The part of a parameter, by its name in `spec.named_specs`; "" for what never runs."""
    top, _, rest = name.partition(".")
    if top != "vision":
        return "lm"
    first = rest.partition(".")[0]
    return "" if first == "unused" else "projector" if first in _PROJECTOR else "tower"


def taken(tree: Tree, parts: Sequence[str]) -> Tree:
    """What is trained of a tree of a model's parameters (or of their ParamSpec): nested mappings, without the others.

    Args:
      parts: as `keys.rates_of` reads them; none: all parts.
    """
    if "vision" not in tree:
        return tree
    rates = rates_of(parts) or dict.fromkeys(PARTS, 1.0)

    def some(node: Tree, prefix: str) -> Tree:
        found = {}
        for key, value in node.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                if inner := some(value, f"{name}."):
                    found[key] = inner
            elif part_of(name) in rates:
                found[key] = value
        return found

    return some(tree, "")


def filled(tree: Tree, some: Tree) -> Tree:
    """The tree with what `some` of it has (of `taken`) in its places."""
    if not isinstance(some, Mapping):
        return some
    return {key: filled(value, some[key]) if key in some else value for key, value in tree.items()}


def scaled(updates: Tree, parts: Sequence[str]) -> Tree:
    """Updates of `taken`, times the rates of their parts."""
    rates = rates_of(parts)
    if all(rate == 1.0 for rate in rates.values()):
        return updates
    return jax.tree_util.tree_map_with_path(lambda path, x: x * rates[part_of(name_of(path))], updates)
