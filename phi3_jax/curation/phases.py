"""Two phases of training from one corpus: which document serves as what in which phase, and how often it will be read.

A role is a part of a phase with a rate, its share of the phase's tokens. It is filled with documents of some sources or
genres; the role whose documents are `*` takes all that no other role names. Of a role in both phases, phase 2 has a part of
what phase 1 has: the documents whose `data.quality` reaches a limit (arXiv:2404.14219, section 2, has "even more heavily
filtered" web text in phase 2). Each kept document carries its role and its phases as columns, so a document of phase 2 is
told to be one of phase 1 by its own row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phi3_jax.data.quality import quality
from phi3_jax.errors import UserError

REST = "*"
MANY = (
    4  # passes over a text up to which they are worth about as much as new text (Muennighoff et al., arXiv:2305.16264)
)
COLUMNS = ("role", "phases")
BOTH = "12"


@dataclass(frozen=True)
class Role:
    """Of `NAME=SOURCE+GENRE:RATE1:RATE2`; a rate of 0: not in that phase."""

    name: str
    of: tuple[str, ...]
    rates: tuple[float, float]

    @staticmethod
    def parse(text: str) -> Role:
        """Reads one.

        Raises:
          UserError: another form, or a rate outside 0 to 1.
        """
        name, equals, rest = text.partition("=")
        what, _, rates = rest.partition(":")
        try:
            first, second = map(float, rates.split(":"))
        except ValueError:
            first = second = -1.0
        if not (equals and name.isidentifier() and what and 0 <= first <= 1 and 0 <= second <= 1):
            raise UserError(
                f"roles: {text!r} is not NAME=SOURCE+GENRE:RATE1:RATE2 with rates from 0 to 1, such as web=*:0.9:0.5"
            )
        return Role(name, tuple(what.split("+")), (first, second))


def check_role(text: str, shown: str) -> None:
    """For the key of a role."""
    Role.parse(text)


class Phases:
    """Sorts documents into roles and phases, and counts them.

    Raises:
      UserError: roles that are there twice, or rates of a phase that do not sum to 1.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._tokens = int(config["phase1"]), int(config["phase2"])
        self._quality = float(config["quality"])
        self._roles = [Role.parse(text) for text in config["roles"]]
        self._of = {name: role for role in self._roles for name in role.of}
        if sum(len(role.of) for role in self._roles) > len(self._of) or len({r.name for r in self._roles}) < len(
            self._roles
        ):
            raise UserError("roles: a role, or a source of two roles, is named twice; name each once")
        for phase, tokens in enumerate(self._tokens):
            whole = sum(role.rates[phase] for role in self._roles)
            if tokens and abs(whole - 1) > 1e-6:
                raise UserError(f"roles: the rates of phase {phase + 1} sum to {whole:g}; make them sum to 1")
        self._documents: Counter[tuple[str, int]] = Counter()
        self._there: Counter[tuple[str, int]] = Counter()

    def sort(self, source: str, genre: str, text: str, tokens: int) -> dict[str, str]:
        """The columns of a document."""
        role = self._of.get(source) or self._of.get(genre) or self._of.get(REST)
        if role is None:
            return dict.fromkeys(COLUMNS, "")
        phases = "".join(str(n + 1) for n in (0, 1) if self._tokens[n] and role.rates[n])
        if phases == BOTH and quality(text) < self._quality:
            phases = "1"
        for phase in phases:
            self._documents[role.name, int(phase) - 1] += 1
            self._there[role.name, int(phase) - 1] += tokens
        return dict(zip(COLUMNS, (role.name, phases), strict=True))

    def entries(self) -> dict[str, Any]:
        """{phase: {tokens, roles: {role: rate, documents, tokens that are there, epochs}}} for the manifest.

        Raises:
          UserError: a role without documents.
        """
        found: dict[str, Any] = {}
        for phase, tokens in enumerate(self._tokens):
            if not tokens:
                continue
            roles = {}
            for role in self._roles:
                there, rate = self._there[role.name, phase], role.rates[phase]
                if not rate:
                    continue
                if not there:
                    raise UserError(
                        f"role {role.name} has no document for phase {phase + 1} ({', '.join(role.of)}); name other "
                        "sources or genres in roles, or set its rate to 0"
                    )
                counts = {"documents": self._documents[role.name, phase], "tokens": there}
                roles[role.name] = {"rate": rate, **counts, "epochs": rate * tokens / there}
            found[str(phase + 1)] = {"tokens": tokens, "roles": roles}
        return found


def of(config: Mapping[str, Any]) -> Phases | None:
    """The phases that a config asks for; None where it asks for none."""
    return Phases(config) if config["phase1"] or config["phase2"] else None


def rows(manifest: Mapping[str, Any]) -> list[list[str]]:
    """phase, role, rate, documents, tokens there, tokens wanted, epochs: a row for each role of each phase."""
    return [
        [phase, name, f"{role['rate']:g}", f"{role['documents']:,}", f"{role['tokens']:,}",
         f"{role['rate'] * of['tokens']:,.0f}", f"{role['epochs']:.2f}"]
        for phase, of in manifest.get("phases", {}).items()
        for name, role in of["roles"].items()
    ]  # fmt: skip


HEADER: Sequence[str] = ("phase", "role", "rate", "documents", "tokens there", "tokens wanted", "epochs")


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """Roles that are read over and over, and those of which phase 2 holds all that phase 1 does."""
    found = manifest.get("phases", {})
    many = [
        f"phase {phase} reads role {name} {role['epochs']:.1f} times; beyond {MANY} a pass is worth less and less"
        for phase, of in found.items()
        for name, role in of["roles"].items()
        if role["epochs"] > MANY
    ]
    first, second = (found.get(phase, {"roles": {}})["roles"] for phase in BOTH)
    return many + [
        f"phase 2 has all documents that phase 1 has of role {name}; for a stricter choice raise --config.quality"
        for name in sorted(first.keys() & second.keys())
        if first[name]["documents"] == second[name]["documents"]
    ]
