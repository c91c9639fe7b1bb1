"""Answers of exercises, checked by running them: a rule on documents whose field `checker` says how.

`number`: the last line `Answer: NUMBER` must be what the last Python block computes into `answer`. `python`: the function
of the first block must pass the assert statements of the last one, and a function that gives nothing must not. What a
model wrote runs in the sandbox of evaluation alone; a machine that cannot isolate it is refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any

from phi3_jax.curation.rule import EXEMPT, Check, Measured, Rule
from phi3_jax.evaluation import sandbox
from phi3_jax.keys import whole

_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)```", re.S)
_ANSWER = re.compile(r"^\W*answer\W*?[:=]\s*\W*?(-?[\d,]*\.?\d+)", re.M | re.I)
NEAR = 1e-6  # of the number that is said, relatively, or half a unit of its last digit


def answers(text: str, row: Mapping[str, Any], asserts: int = 3, seconds: int = 10) -> Measured:
    """(no answer that can be checked, the answer is wrong, the check proves nothing), each 0 or 1."""
    check = {"number": _number, "python": _python}.get(str(row.get("checker") or ""))
    if check is None:
        return (0.0, 0.0, 0.0), text
    # The CPU's time decides, so that a busy machine drops no right answer; the clock stops what only waits.
    return check(text, asserts, sandbox.Limits(seconds=6.0 * seconds, cpu_seconds=seconds)), text


def _number(text: str, asserts: int, limits: sandbox.Limits) -> tuple[float, float, float]:
    blocks, said = _BLOCK.findall(text), _ANSWER.findall(_BLOCK.sub("", text))
    tree = _parsed(blocks[-1]) if blocks else None
    if not said or tree is None or not said[-1].replace(",", ""):
        return 1.0, 0.0, 0.0
    number = said[-1].replace(",", "")
    room = 0.5 * 10.0 ** -len(number.partition(".")[2]) if "." in number else 0.0
    test = f"_said, _got = {float(number)!r}, float(answer)\nassert abs(_got - _said) <= max({room!r}, {NEAR} * abs(_said))"
    if not sandbox.run(f"{blocks[-1]}\n{test}", limits).passed:
        return 0.0, 1.0, 0.0
    computes = any(isinstance(node, ast.BinOp | ast.Call | ast.AugAssign) for node in ast.walk(tree))
    return 0.0, 0.0, float(not computes)


def _python(text: str, asserts: int, limits: sandbox.Limits) -> tuple[float, float, float]:
    blocks = _BLOCK.findall(text)
    trees = [_parsed(block) for block in blocks]
    if len(blocks) < 2 or trees[0] is None or trees[-1] is None:
        return 1.0, 0.0, 0.0
    names = [node.name for node in trees[0].body if isinstance(node, ast.FunctionDef)]
    tests = sum(isinstance(node, ast.Assert) for node in ast.walk(trees[-1]))
    if not names or tests < asserts:
        return 1.0, 0.0, 0.0
    if not sandbox.run(f"{blocks[0]}\n{blocks[-1]}", limits).passed:
        return 0.0, 1.0, 0.0
    nothing = "\n".join(f"def {name}(*_, **__): return None" for name in names)
    return 0.0, 0.0, float(sandbox.run(f"{blocks[0]}\n{nothing}\n{blocks[-1]}", limits).passed)


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


ANSWERS = Rule(
    "Answers of exercises, run in a sandbox: the number that is said is computed, the function passes tests that a "
    "function without content fails",
    answers,
    (Check("no_answer", 0.5), Check("wrong_answer", 0.5), Check("proves_nothing", 0.5)),
    {
        "asserts": whole("least assert statements of an exercise in Python", 3, 1),
        "seconds": whole("of the CPU that a program may use", 10, 1, 600),
        "exempt": EXEMPT,
    },
    meta=True,
)
