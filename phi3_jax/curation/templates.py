"""Prompts of synthetic text: templates with axes, from which requests are made. A new one is a row of `TEMPLATES`.

A template is known by the hash of all it holds, so that other words are another template whatever its version says. What
its text asks for and how it varies follow textbooks and exercises (Gunasekar et al., arXiv:2306.11644), seed x audience x
style x format (Ben Allal et al. 2024, Cosmopedia) and rephrased pages (Maini et al., arXiv:2401.16380).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError, nearest

PAGE, OPENING = "page", "opening"  # axes whose values are pages of a curated corpus
Axes = Mapping[str, tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Template:
    """One template.

    Attributes:
      version: raised by whoever changes what it asks for.
      prompt: with the name of each axis in braces; `{page}` is a page of a curated corpus, `{opening}` its first words.
      genre: of the documents.
      axes: {name: values}. `subject` may be replaced by a file of the user's.
      checker: how the answer is checked (`curation.answers`): "", "number" or "python".
      bare: the reply goes on with the prompt, which is part of the document: for models that nobody taught to chat.
    """

    version: int
    prompt: str
    genre: str
    axes: Axes = dataclasses.field(default_factory=dict)
    checker: str = ""
    bare: bool = False

    @property
    def hash(self) -> str:
        """Sixteen hex digits of SHA-256 of everything that it holds."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def pages(self) -> bool:
        """Whether it needs pages of a curated corpus."""
        return bool({PAGE, OPENING} & set(_fields(self.prompt)))


def _fields(prompt: str) -> list[str]:
    return [name for _, name, _, _ in string.Formatter().parse(prompt) if name is not None]


AUDIENCES = (
    "a curious ten-year-old", "a high-school student", "a first-year college student", "a working engineer",
    "an adult who returns to the subject after many years",
)  # fmt: skip
STYLES = (
    "plain and patient, one idea after another", "with one worked example that runs through the whole text",
    "as answers to the questions that a reader would ask", "with the common mistakes and why they are tempting",
    "with comparisons from everyday life",
)  # fmt: skip
LESSONS = (
    "why dividing by a fraction is multiplying by its inverse", "percentages of percentages", "proof by contradiction",
    "the difference between correlation and cause", "reading a graph with a logarithmic axis", "mathematical induction",
    "conditional probability and base rates", "units and dimensional analysis", "estimating unknown quantities",
    "negative numbers", "prime numbers and factorisation", "the pigeonhole principle", "slope and rate of change",
    "if-then statements and their converse", "necessary and sufficient conditions", "sets and Venn diagrams",
    "why objects float or sink", "energy that changes its form", "friction", "levers and pulleys", "pressure in liquids",
    "how vaccines prepare the body", "natural selection", "the water cycle", "why there are seasons",
    "acids and bases in a kitchen", "how heat travels", "electric circuits with a battery and a bulb", "sound as a wave",
    "why the sky is blue", "planning a route with a map", "how a lock and a canal work", "supply and demand",
    "compound interest", "how to judge a source", "recursion", "binary search", "how a hash table works",
    "loops and invariants", "sorting by insertion", "big-O notation by example", "binary numbers", "how floats are rounded",
    "how to test a function", "what a queue and a stack are for", "dynamic programming", "shortest paths in graphs",
    "how to find a fault in a program", "parsing simple expressions", "state machines",
)  # fmt: skip
PROBLEMS = (
    "a shop with discounts", "trains, speeds and times", "sharing a bill", "mixing two solutions", "ages of siblings",
    "a garden with a fence", "filling and draining a tank", "a recipe for another number of guests", "wages and overtime",
    "a savings account", "coins in a jar", "tickets for a concert", "a bookshelf", "painting a room", "fuel of a journey",
    "averages of marks", "a school trip by bus", "harvest and storage", "packing boxes", "a race with head starts",
    "workers on a wall", "currency exchange", "a calendar and weekdays", "counting combinations of clothes",
)  # fmt: skip
FUNCTIONS = (
    "strings: counting, reversing, comparing", "lists: searching and filtering", "dictionaries that count",
    "integers: digits and divisors", "dates without a library", "matrices as lists of lists", "intervals that overlap",
    "brackets that match", "run-length encoding", "roman numerals", "prime numbers", "binary search", "queues and stacks",
    "merging sorted lists", "recursion on nested lists", "simple ciphers", "paths in a grid", "sets of words",
    "sums of subsets", "rounding and units",
)  # fmt: skip
LEVELS = ("one step", "two or three steps", "several steps, one of which is easy to overlook")
TEMPLATES: dict[str, Template] = {
    "textbook": Template(
        1,
        "Write a section of a textbook about {subject} for {audience}. Write {style}. {format} Explain why each step "
        "holds, not only that it does. Use 250 to 500 words of plain text, no headline, no list of links, no "
        "remark about this request.",
        "textbook",
        {
            "subject": LESSONS,
            "audience": AUDIENCES,
            "style": STYLES,
            "format": (
                "Begin with a question and answer it at the end.", "Begin with a concrete case and then say the rule.",
                "State the rule first and then show where it fails.", "Let each paragraph follow from the one before.",
            ),
        },
    ),
    "exercise": Template(
        1,
        "Write an exercise in words about {subject} for {audience}. Solving it takes {format}. Write {style}. First the "
        "exercise, then a solution that shows each step, then a line of the form\nAnswer: NUMBER\nand then a block that "
        "begins with ```python and ends with ```, which computes the number from those of the exercise and puts it into "
        "the variable answer. No remark about this request.",
        "reasoning",
        {
            "subject": PROBLEMS,
            "audience": AUDIENCES[:3],
            "style": ("soberly", "as a short story", "as a dialogue of two people"),
            "format": LEVELS,
        },
        "number",
    ),
    "exercise_code": Template(
        1,
        "Write an exercise in Python on {subject}, for {audience}. {style} Solving it takes {format}. First say in words "
        "what a function shall do, with its name and arguments. Then a block that begins with ```python and ends with ```, "
        "with the function, which has a docstring and uses the standard library alone. Then a second such block with at "
        "least three assert statements that call it, among them a case at a limit. No remark about this request.",
        "code",
        {
            "subject": FUNCTIONS,
            "audience": ("a beginner", "a second-year student", "someone who knows another language"),
            "style": ("Take an example from everyday life.", "Take an example from science.", "Keep it abstract."),
            "format": LEVELS,
        },
        "python",
    ),
    "rephrase": Template(
        1,
        "Say the following text in other words, {style}, for {audience}. Keep every fact and number, add none, and keep to "
        "the order of what follows from what. No remark about this request.\n\n{page}",
        "textbook",
        {"audience": AUDIENCES, "style": ("as a clear article", "as questions with answers", "as a section of a textbook")},
    ),
    "opening": Template(1, "{opening}", "fiction", bare=True),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Seed:
    """What fills a template: a value for each axis, the number of a page (-1: none), and the number of the draw.

    Attributes:
      draw: 0 for the first request with these values, 1 for the second, ..
    """

    values: Mapping[str, str]
    page: int
    draw: int


def chosen(names: tuple[str, ...], subjects: str) -> dict[str, Template]:
    """The templates of some names, with the subjects of a file where one is named.

    Raises:
      UserError: an unknown name, a template that names an axis it has not, or a file without a line.
    """
    found = {}
    own = _subjects(subjects) if subjects else ()
    for name in names:
        if name not in TEMPLATES:
            raise UserError(f"templates={name} is unknown{nearest(name, TEMPLATES)}")
        template = TEMPLATES[name]
        if own and "subject" in template.axes:
            template = dataclasses.replace(template, axes={**template.axes, "subject": own})
        lost = set(_fields(template.prompt)) - {PAGE, OPENING} - set(template.axes)
        if lost or any(not values for values in template.axes.values()):
            raise UserError(
                f"template {name} has no value for {', '.join(sorted(lost)) or 'one of its axes'}; add an axis"
            )
        found[name] = template
    return found


def _subjects(path: str) -> tuple[str, ...]:
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"subjects={path} cannot be read as UTF-8 text: {error}") from error
    found = tuple(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip()))
    if not found:
        raise UserError(f"subjects={path} holds no line; write one subject a line")
    return found


def seeds(template: Template, seed: int, pages: int) -> Iterator[Seed]:
    """Values in a random order, each combination once before any comes again; the first n are those of any longer list.

    Args:
      pages: how many there are, where the template takes pages.
    """
    axes = sorted(template.axes)
    sizes = [len(template.axes[name]) for name in axes] + ([pages] if template.pages else [])
    whole = functools.reduce(lambda a, b: a * b, sizes, 1)
    taken: set[int] = set()
    draw = count = 0
    while True:
        digest = hashlib.sha256(f"{seed}|{template.hash}|{pages}|{draw}|{count}".encode()).digest()
        number, count = int.from_bytes(digest[:8], "big") % whole, count + 1
        if number in taken:
            continue
        taken.add(number)
        rest, places = number, []
        for size in sizes:
            places.append(rest % size)
            rest //= size
        values = {name: template.axes[name][at] for name, at in zip(axes, places)}
        yield Seed(values, places[-1] if template.pages else -1, draw)
        if len(taken) == whole:
            draw, count, taken = draw + 1, 0, set()


def filled(template: Template, values: Mapping[str, Any], page: str, words: int) -> str:
    """The prompt of a template.

    Args:
      page: text of the page, "" for none; words: of it that are shown, whole sentences where there are.
    """
    return template.prompt.format_map({**values, PAGE: excerpt(page, words), OPENING: " ".join(page.split()[:12])})


_END = re.compile(r"[.!?][\"')\]]*\s")


def excerpt(text: str, words: int) -> str:
    """The beginning of a text, up to so many words, cut after a sentence or, without one, after a word."""
    places = [match.end() for match in re.finditer(r"\S+", text)]
    if len(places) <= words:
        return text.strip()
    cut = text[: places[words - 1]]
    ends = [match.end() for match in _END.finditer(cut)]
    return cut[: ends[-1]].rstrip() if ends and ends[-1] > len(cut) // 2 else cut
