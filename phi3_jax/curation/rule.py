"""What a rule on one document is: numbers that are measured, and limits that decide.

A rule measures first and decides later. So every document has its numbers, also one that another rule has dropped; other
limits need no other measurement; and the page can show which documents were near a limit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from phi3_jax.keys import Key, word

Measured = tuple[Sequence[float], str]  # a value for each check, and the text, changed or not


@dataclasses.dataclass(frozen=True)
class Check:
    """One number of a rule and the limit beyond which a document is dropped.

    Attributes:
      reason: what a dropped document carries.
      limit: the parameter that holds the limit, or the limit.
      above: dropped where the value is greater than the limit; else where it is smaller.
    """

    reason: str
    limit: str | float
    above: bool = True


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule on one document.

    Attributes:
      doc: what it does, and where it comes from.
      measure: (text, row, **parameters that are no limits) -> `Measured`; `row` holds the document's other fields.
      checks: in order; the first that fails gives the reason.
      keys: {parameter: its declaration and default}.
      changes: it may change the text.
      meta: it looks at fields of a row beside id, source, genre, licence and given id.
    """

    doc: str
    measure: Callable[..., Measured]
    checks: tuple[Check, ...] = ()
    keys: Mapping[str, Key] = dataclasses.field(default_factory=dict)
    changes: bool = False
    meta: bool = False

    @property
    def limits(self) -> set[str]:
        """Parameters that only decide."""
        return {check.limit for check in self.checks if isinstance(check.limit, str)}

    def how(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters that measuring takes, of all that are set."""
        return {name: values[name] for name in self.keys if name not in self.limits}


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a curation: its name, the rule of the table that it is, and all parameters.

    Attributes:
      corpus: its rule looks at many documents.
    """

    name: str
    rule: str
    parameters: Mapping[str, Any]
    corpus: bool = False


EXEMPT = Key("genres of documents that the rule leaves alone", (), tuple, item=word("a genre", None))


def decide(checks: Sequence[Check], values: Sequence[float], parameters: Mapping[str, Any]) -> str:
    """The reason of the first check that fails; "" where none does. A value that is not a number fails no check."""
    for check, value in zip(checks, values, strict=True):
        limit = parameters[check.limit] if isinstance(check.limit, str) else check.limit
        if value > limit if check.above else value < limit:
            return check.reason
    return ""
