r"""What a reply says: letters, numbers, \boxed{} mathematics, short answers and code, and whether it is the gold one.

Every function takes the text that a model generated, with or without chat manners, and returns None (or False) where it
finds no answer: no answer counts as wrong.
"""

from __future__ import annotations

import re
import string
import textwrap
from collections.abc import Sequence
from fractions import Fraction

CUE = re.compile(r"\banswer(?:\s+(?:is|would be)\b|\s*:|\**\s*:)|####|\\boxed(?=\{)", re.IGNORECASE)
NUMBER = re.compile(r"(?<![\w.])[-−]?\s?\$?[-−]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)(?!\d)")
_LETTER = re.compile(  # after a cue; a small letter only where nothing but marks follows
    r"[\s:*_`\"'$\[({]*(?:option |choice |\\text\{)?\(?([A-Z](?![\w'’])|[a-z](?=[)\].\s*}$]*$))"
)
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # of HumanEval (Chen et al., arXiv:2107.03374)
FENCE = re.compile(r"```[\w+-]*[ \t]*\r?\n(.*?)(?:\r?\n?```|\Z)", re.DOTALL)


def letters(count: int) -> str:
    """The letters of so many options."""
    return string.ascii_uppercase[:count]


def letter(reply: str, choices: Sequence[str], last: bool = False) -> int | None:
    """Index of the option that a reply names: "B", "(B)", "B.", "Answer: B", "The answer is B", "**B** because ...".

    A letter beyond the options is no answer, nor is an option's text without its letter. A leading A or I that begins a
    sentence ("A planet ...") is an article, unless the option's text follows.

    Args:
      reply: generated text.
      choices: the options' texts.
      last: whether the last statement counts (a reply that reasons first), not the first.
    """
    marks = letters(len(choices))
    text = re.split(r"\n\s*Question:", reply.strip())[0]
    stated = [match[1].upper() for cue in CUE.finditer(text) if (match := _LETTER.match(text[cue.end() :]))]
    if stated:
        found = stated[-1 if last else 0]
        return marks.index(found) if found in marks else None
    if last:
        marked = [found for found in re.findall(r"\(([A-Z])\)", text) if found in marks]
        if marked:
            return marks.index(marked[-1])
    if match := re.fullmatch(r"\W*([A-Za-z])\W*", text):
        return marks.index(match[1].upper()) if match[1].upper() in marks else None
    if match := re.match(r"[\s*_`\"'\[(]*([A-Z])([)\].:,*_`\"'\n]|\s+(?:is|because|since|as)\b|\s*[-–—(]\s)", text):
        return marks.index(match[1]) if match[1] in marks else None
    if match := re.match(r"[\s*_`\"'\[(]*([A-Z])\s+", text):
        found, rest = match[1], trivia(text[match.end() :])
        follows = found in marks and bool(rest) and trivia(choices[marks.index(found)]).startswith(rest[:20])
        if found in marks and (found not in "AI" or follows):
            return marks.index(found)
    named = {found for found in re.findall(r"\(([A-Z])\)|\b[Oo]ption\s+([A-Z])\b", text) for found in found if found}
    return marks.index(named.pop()) if len(named) == 1 and named <= set(marks) else None


def number(text: str) -> Fraction | None:
    """The number that a text is: "1,000", "$18", "18.", "-3.50", "70%"; None for anything else."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.replace("−", "-"))
    text = re.sub(r"[\s$%*]|\\[$%]", "", text).rstrip(".")
    try:
        return Fraction(text) if re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+|\d+/\d+)", text) else None
    except ZeroDivisionError:
        return None


def last_number(reply: str) -> Fraction | None:
    r"""The number after the last "The answer is", "Answer:", #### or \boxed; without such a cue the last number at all."""
    cues = list(CUE.finditer(reply))
    if cues:
        line = reply[cues[-1].end() :].strip().split("\n")[0]
        if found := NUMBER.findall(line.rpartition("=")[2]) or NUMBER.findall(line):
            return number(found[0])
    found = NUMBER.findall(reply)
    return number(found[-1]) if found else None


def boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...} (or \fbox{...}, or \boxed 5), braces matched; None without a whole one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = re.sub(r"^\\(boxed|fbox)\s*", "", text[start:])
    if not rest.startswith("{"):
        return re.split(r"[\s$]", rest)[0] or None
    depth = 0
    for place, character in enumerate(rest):
        depth += (character == "{") - (character == "}")
        if not depth:
            return rest[1:place]
    return None


_UNITS = (
    r"(?:square |cubic |sq\.? )?(?:units?|degrees?|dollars?|cents?|inch(?:es)?|in\.|feet|foot|ft|yards?|miles?|mph|"
    r"(?:centi|milli|kilo)?(?:met(?:er|re)s?|grams?)|cm|mm|km|hours?|minutes?|seconds?|days?|weeks?|years?|points?|"
    r"percent|people|ways)(?:\^\{?[23]\}?)?"
)


def mathematics(text: str) -> str:
    r"""A LaTeX answer in one spelling: no spaces, \left, \right, $, units, degrees or per cent; one kind of fraction."""
    text = text.strip().replace("\n", " ").replace("−", "-")
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|!|,|;|:|quad|\(|\)|\[|\])(?![a-zA-Z])|\\?\$", "", text)
    text = re.sub(r"\\ |~", " ", text).replace("{,}", ",")
    text = re.sub(r"\\[dtc]frac", r"\\frac", text)
    text = re.sub(r"(?<=[\w})])\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?\s*\.?$", "", text)  # a unit
    text = re.sub(r"\\(?:text|mbox|mathrm|textrm|textbf|mathbf|textit)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(rf"(?<=[\d}}])\s*{_UNITS}\s*\.?$", "", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\circ|\\degree|\\?%", "", text)
    text = re.sub(r"^[a-zA-Z](?:\([a-zA-Z]\))?\s*=\s*(?=\S)(?!.*=)", "", text.strip())  # "x = 5"
    text = (
        re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
        if re.fullmatch(r"-?\s*\d{1,3}(,\d{3})+(\.\d+)?\.?", text)
        else text
    )
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"\\(frac)(\d)(\d)", r"\\\1{\2}{\3}", text)  # \frac12
    text = re.sub(r"\\frac(\d)\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})(\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt(\w)", r"\\sqrt{\1}", text)
    text = re.sub(r"^(-?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    text = re.sub(r"\\frac\{-(\w+)\}", r"-\\frac{\1}", text)
    return re.sub(r"(?<!\d)\.(\d)", r"0.\1", text)


def equal_mathematics(reply: str | None, gold: str) -> bool:
    r"""Whether two answers are spelt the same (`mathematics`), or are the same rational number (0.5 and \frac{1}{2})."""
    if reply is None:
        return False
    first, second = mathematics(reply), mathematics(gold)
    values = [number(re.sub(r"^(-?)\\frac\{(\d+)\}\{(\d+)\}$", r"\1\2/\3", text)) for text in (first, second)]
    return first == second or (values[0] is not None and values[0] == values[1])


def mathematical_answer(reply: str) -> str | None:
    r"""The last \boxed{}, or, without one, what follows the last "answer is" on its line."""
    if (found := boxed(reply)) is not None:
        return found
    cues = list(CUE.finditer(reply))
    return reply[cues[-1].end() :].strip(" :*").split("\n")[0].rstrip(" .*") or None if cues else None


def after_cue(reply: str, gold: str) -> str | None:
    """What follows the last "the answer is" of a BBH reply, as `short` spells it and cut to the kind of the gold answer."""
    cues = list(CUE.finditer(reply))
    line = reply[cues[-1].end() :].lstrip(" :*\n").split("\n")[0] if cues else ""
    if re.fullmatch(r"\([A-Z]\)", gold):
        match = re.match(r"[\s*_`\"'\[({]*(?:option )?\(?([A-Z])(?!\w)", line)
        return f"({match[1]})".lower() if match else None
    if re.fullmatch(r"[A-Za-z]+", gold):
        match = re.match(r"[\W_]*([A-Za-z]+)", line)
        return match[1].lower() if match else None
    return short(line, gold) or None


def short(text: str, gold: str = "") -> str:
    """Lower case, single spaces, no quotes, bold or final point; Dyck words without spaces, lists without commas."""
    text = " ".join(text.strip().strip("*`\"'$ ").rstrip(". ").strip("*`\"'$ ").lower().split())
    if gold and not set(gold) - set("()[]{}<> "):
        return text.replace(" ", "")
    return text if "," in gold else " ".join(text.replace(",", " ").split())


def equal_short(reply: str, gold: str) -> bool:
    """Whether a BBH reply states the gold answer."""
    return after_cue(reply, gold) == (gold.lower() if re.fullmatch(r"\([A-Z]\)", gold) else short(gold, gold))


def phrase(reply: str) -> str:
    """The short answer in a reply: its first line that is not empty, without "The answer is" and a final point."""
    line = next((line for line in reply.split("\n") if line.strip()), "")
    return re.sub(r"^\W*(?:the (?:correct )?)?answer(?: is|:)\s*", "", line, flags=re.IGNORECASE).strip(" .*\"'")


def trivia(text: str) -> str:
    """TriviaQA's own normal form: lower case, no articles, no punctuation, single spaces (Joshi et al., 2017)."""
    marks = string.punctuation + "‘’´`“”"
    text = "".join(" " if character in marks else character for character in text.lower().replace("_", " "))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def fenced(reply: str) -> str | None:
    """The first fenced block with a def in it, or else the first one; None without a fence."""
    blocks = FENCE.findall(reply)
    return (
        next((block for block in blocks if re.search(r"^\s*def ", block, re.MULTILINE)), blocks[0]) if blocks else None
    )


def humaneval_program(prompt: str, reply: str, test: str, entry_point: str) -> str:
    """The program to run: prompt, completion (or the whole function, from a chat reply's block), tests and their call.

    A whole function follows the prompt, whose own function is then only its docstring; so imports and helpers stay.
    """
    block = fenced(reply)
    code = reply if block is None else block
    whole = re.search(rf"^def {re.escape(entry_point)}\b", code, re.MULTILINE)
    if block is None:
        start = whole.end() if whole else 0
        code = code[: min((found for stop in STOPS if (found := code.find(stop, start)) >= 0), default=len(code))]
    if not whole and code.strip() and not code.lstrip("\n")[0].isspace():
        lines = code.strip("\n").split("\n")
        later = [line for line in lines[1:] if line.strip()]
        if later and all(line[0].isspace() for line in later) and not lines[0].rstrip().endswith(":"):
            code = "    " + "\n".join(lines)  # only the first line lost its indentation
        else:
            code = textwrap.indent("\n".join(lines), "    ")
    return f"{prompt}{chr(10) if whole else ''}{code}\n{test}\ncheck({entry_point})\n"


def mbpp_program(reply: str, setup: str, tests: Sequence[str]) -> str:
    """The program to run: the code up to [DONE] (or a chat reply's block), then the set-up and the asserts."""
    block = fenced(reply)
    code = (reply if block is None else block).partition("[DONE]")[0].rpartition("[BEGIN]")[2]
    return "\n".join([code, setup, *tests, ""])
