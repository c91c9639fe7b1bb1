"""What the suite reads out of replies: letters, numbers, mathematics, short answers, programs."""

from __future__ import annotations

from fractions import Fraction

import pytest

pytest.importorskip("lm_eval")

from suite_fakes import confined

from phi3_jax.evaluation import sandbox
from phi3_jax.evaluation.suites.phi3_report import answers

CHOICES = ("dog", "cat", "a bird flying", "whale")


@pytest.mark.parametrize(
    ("reply", "choice"),
    (
        *(
            (text, "B")
            for text in ("B", " B", "(B)", "B.", "B) cat", "Answer: B", "The answer is B", "The answer is (B).")
        ),
        *((text, "B") for text in ("**B**", "**B. cat**", "The correct answer is B. cat", "**Answer:** B", "b", "(b)")),
        *((text, "B") for text in ("The correct answer is: **B**", "Answer:\nB", "B cat", "B, cat", "**Answer**: B")),
        *((text, "B") for text in ("The answer is $\\boxed{B}$.", "B\n\nQuestion:\nNext\nAnswer: C")),
        *((text, "C") for text in ("C because birds fly", "Option C", "\\boxed{\\text{C}}", "C - a bird")),
        *((text, "A") for text in ("A", "A. dog", "A dog", "Answer: A dog", "The answer is A because it barks")),
        *((text, "D") for text in ("I think (D) is right", "[D]", '"D"', "D\nExplanation: ...")),
        *((text, None) for text in ("", " ", "cat", "E", "The answer is E", "A cat is small", "The answer is a cat")),
        *((text, None) for text in ("Both (A) and (B)", "Dogs are it", "It is not clear", "answer is not A", "?", "1")),
    ),
)
def test_letters(reply, choice):
    assert answers.letter(reply, CHOICES) == (None if choice is None else "ABCD".index(choice))


def test_the_last_letter_counts_after_reasoning():
    assert answers.letter("(A) is wrong. The answer is A? No. The answer is (C).", CHOICES, last=True) == 2
    assert answers.letter("First (A), then (B)", CHOICES, last=True) == 1
    assert answers.letter("C", CHOICES[:2]) is None


@pytest.mark.parametrize(
    ("reply", "number"),
    (
        *(("The answer is 1,000.", 1000), ("5. The answer is $18.00.", 18), ("#### 7", 7), ("\\boxed{-3}", -3)),
        *(("The answer is 2 * 3 = 6 eggs.", 6), ("First 3 and then 42", 42), ("The answer is 5%", 5), ("none", None)),
        *(
            ("The answer is -12.", -12),
            ("10-3 = 7", 7),
            ("**Answer: 12**", 12),
            ("answer: 3.5 hours", Fraction(7, 2)),
        ),
        *(("The answer is 1. No: the answer is 2.", 2), ("", None), ("The answer is \\$1,234,567", 1234567)),
    ),
)
def test_numbers(reply, number):
    assert answers.last_number(reply) == number


def test_numbers_of_targets():
    texts = ("1,000", "$18", "18.", "-3.50", "70%", "1e3", "x")
    assert [answers.number(text) for text in texts] == [1000, 18, 18, Fraction(-7, 2), 70, None, None]


@pytest.mark.parametrize(
    ("reply", "gold", "same"),
    (
        *((r"\frac12", "1/2", True), ("0.5", r"\dfrac{1}{2}", True), (r"\left(3, 4\right)", "(3,4)", True)),
        *((r"5\text{ cm}", "5", True), ("1,000", "1000", True), (r"90^\circ", "90", True), (r"\$5", "5", True)),
        *(("x=5", "5", True), (r"12\%", "12", True), (r"\text{(B)}", "(B)", True), (r"\text{even}", "even", True)),
        *((r"\sqrt3", r"\sqrt{3}", True), (r"\frac{-1}{2}", r"-\frac{1}{2}", True), ("5 inches", "5", True)),
        *((".5", "0.5", True), ("2.0", "2", True), (r"\frac{\sqrt{3}}{2}", r"\frac{\sqrt3}2", True), ("5.", "5", True)),
        *(("10{,}000", "10000", True), (r"25\pi", r"25 \pi", True), (r"3\mbox{ square units}", "3", True)),
        *(
            ("2", "3", False),
            ("5x", "5", False),
            ("1,2", "12", False),
            ("X", "x", False),
            (r"\frac{1}{3}", "0.33", False),
        ),
        *((None, "5", False), ("", "5", False), ("1/0", "2", False), (r"\frac{1}{0}", "1", False)),
    ),
)
def test_mathematics(reply, gold, same):
    assert answers.equal_mathematics(reply, gold) is same


def test_boxes():
    assert answers.boxed(r"a \boxed{1} b \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert [answers.boxed(text) for text in (r"\boxed{1", r"$\boxed 5$", "x", r"\fbox{2}")] == [None, "5", None, "2"]
    assert answers.mathematical_answer("So the answer is $7$.") == "$7$" and answers.mathematical_answer("7") is None


@pytest.mark.parametrize(
    ("reply", "gold", "same"),
    (
        *(
            ("So the answer is (B).", "(B)", True),
            ("the answer is B", "(B)", True),
            ("**Answer: (B) 1/2**", "(B)", True),
        ),
        *(("So the answer is no.", "No", True), ("The answer is No, because it", "No", True), ("No", "No", False)),
        *(
            ("So the answer is ]}].", "] } ]", True),
            ("the answer is 123.", "123", True),
            ("the answer is -1", "-1", True),
        ),
        *(("So the answer is a, b, c.", "a b c", True), ("So the answer is (C).", "(B)", False)),
        *(("So the answer is Nope", "No", False), ("the answer is 12", "123", False), ("", "valid", False)),
        *(("The answer is B. Wait, so the answer is (A).", "(A)", True), ("the answer is a c b.", "a b c", False)),
    ),
)
def test_short_answers(reply, gold, same):
    assert answers.equal_short(reply, gold) is same


def test_trivia():
    replies = ("The answer is Paris.", " Paris\n\nQuestion", "\n\nParis", "**Paris**", "the Paris!", "Paris, France")
    assert [answers.trivia(answers.phrase(reply)) for reply in replies] == ["paris"] * 5 + ["paris france"]


@confined
def test_programs_of_replies():
    start, test = 'import math\n\n\ndef f(x):\n    """Half."""\n', "def check(f):\n    assert f(4) == 2\n"
    replies = {
        "completion": "    return x / math.sqrt(4)\n\ndef other(:\n",
        "first line not indented": "y = math.sqrt(4)\n    return x / y",
        "body not indented": "y = math.sqrt(4)\nreturn x / y",
        "block": "Here:\n```python\ndef f(x):\n    return x / math.sqrt(4)\n```\nDone.",
        "block with imports": "```\nfrom math import sqrt\n\n\ndef f(x):\n    return x / sqrt(4)\n```",
        "block of a body": "```python\nreturn x / 2\n```",
        "block not closed": "```python\ndef f(x):\n    return x / 2",
        "function": "def f(x):\n    return x / 2\n\nprint('never'",
        "wrong": "    return x\n",
        "empty": "",
    }
    programs = [answers.humaneval_program(start, reply, test, "f") for reply in replies.values()]
    passed = [outcome.passed for outcome in sandbox.run_all(programs)]
    assert dict(zip(replies, passed)) == {name: name not in ("wrong", "empty") for name in replies}
    asserts = ["assert g(1) == a"]
    for reply, right in (("def g(x):\n    return 2\n[DONE]\nrubbish(", True), ("[BEGIN]\ndef g(x): return 2", True)):
        assert sandbox.run(answers.mbpp_program(reply, "a = 2", asserts)).passed is right
    assert not sandbox.run(answers.mbpp_program("```\ndef g(x): return 3\n```", "a = 2", asserts)).passed
