"""Templates: plain text with `@fields@`, filled so that no value is ever read as shell or YAML.

In a shell script every field becomes one quoted word (a sequence: several); in a manifest a field is a whole scalar of
the parsed document and is replaced by a Python value.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml

from phi3_jax.errors import UserError

FIELD = re.compile(r"@(\w+)@")


def read(name: str) -> str:
    """The text of a template beside this file."""
    return (resources.files(__package__) / "templates" / name).read_text("utf-8")


def script(name: str, values: Mapping[str, Any]) -> str:
    """A filled shell script.

    Raises:
      UserError: a field has no value.
    """

    def word(match: re.Match[str]) -> str:
        value = _value(name, match[1], values)
        return shlex.quote(value) if isinstance(value, str) else shlex.join(value)

    return FIELD.sub(word, read(name))


def manifest(name: str, values: Mapping[str, Any]) -> str:
    """A filled YAML document.

    Raises:
      UserError: a field has no value.
    """

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(child) for key, child in node.items()}
        if isinstance(node, list):
            return [fill(child) for child in node]
        match = FIELD.fullmatch(node) if isinstance(node, str) else None
        return _value(name, match[1], values) if match else node

    return yaml.dump(
        fill(yaml.safe_load(read(name))), Dumper=_NoAliases, sort_keys=False, allow_unicode=True, width=120
    )


def _value(name: str, field: str, values: Mapping[str, Any]) -> Any:
    value = values.get(field, "")
    if isinstance(value, str) and not value:
        raise UserError(f"the template {name} needs {field!r}; give it with --config.cluster.{field}=VALUE")
    return value


class _NoAliases(yaml.SafeDumper):
    """Writes equal objects in full each time, as people do."""

    def ignore_aliases(self, data: Any) -> bool:
        return True
