"""What the model sees: the text of one item, the answer that an exemplar shows, and the options to score.

`letter` prompts have the layout of the report's Appendix A (question, lettered options, "Answer:"), the same for every
benchmark; its wording for passages, premises and blanks is not published, so those lines are ours. `harness` prompts are
those of lm-eval 0.4.13's stock tasks, word for word, but for TruthfulQA, whose exemplars are real items here and not the
six fixed ones, and AGIEval, MedQA, MMLU, CommonSenseQA and GPQA, where the options are in the prompt there as well.
Exemplars are separated by an empty line.
"""

from __future__ import annotations

import re
from typing import Any

from phi3_jax.evaluation.suites.phi3_report.answers import letters

Doc = dict[str, Any]
ANLI = ("True", "Neither", "False")  # entailment, neutral, contradiction
LETTERED = ("mmlu", "medqa", "commonsense_qa", "gpqa")  # whose stock tasks score the letter after listed options
STEPS = "A: Let's think step by step.\n"


def letter_text(doc: Doc) -> str:
    """Question and lettered options."""
    name, context, question = doc["benchmark"], doc["context"], doc["question"]
    if name == "anli":
        question = f"{context}\nHypothesis: {question}\nIs the hypothesis an entailment, neutral or a contradiction?"
    elif name == "hellaswag":
        question = f"{hellaswag(f'{context}: {_second_sentence(question)}')}\nWhich ending follows?"
    elif name == "winogrande":
        question = f"{question}\nWhich option belongs in place of _?"
    elif context:
        question = f"{context}\n{question}"
    options = [hellaswag(text) if name == "hellaswag" else text for text in doc["choices"]]
    return f"Question:\n{question.strip()}\nOptions:\n{_listed(options)}\nAnswer:"


def letter_target(doc: Doc) -> str:
    """The gold letter, after the reasoning where the exemplars have some (GPQA)."""
    gold = letters(len(doc["choices"]))[doc["answer"]]
    reasons = doc["benchmark"] == "gpqa" and doc["rationale"].strip()
    return f"{reasons} The answer is {gold}." if reasons else gold


def harness_text(doc: Doc) -> str | int:
    """The prompt before the options; WinoGrande's is the gold index, as lm-eval wants where prompts differ by option."""
    name, context, question = doc["benchmark"], doc["context"], doc["question"]
    if name == "winogrande":
        return doc["answer"]
    if name in LETTERED:
        start = "" if name == "mmlu" else "Question: "
        return f"{start}{question if name == 'medqa' else question.strip()}\n{_listed(doc['choices'])}\nAnswer:"
    if name == "agieval":
        lead, last = (f"{context}\n" if context else ""), letters(len(doc["choices"]))[-1]
        listed = " ".join(harness_options(doc))
        return f"{lead}Q: {question} Answer Choices: {listed}\nA: Among A through {last}, the answer is"
    forms = {
        "hellaswag": lambda: hellaswag(f"{context}: {_second_sentence(question)}"),
        "anli": lambda: f"{context}\nQuestion: {question} True, False, or Neither?\nAnswer:",
        "social_iqa": lambda: f"Q: {context} {question}\nA:",
        "openbookqa": lambda: question,
        "boolq": lambda: f"{context}\nQuestion: {question}\nAnswer:",
        "truthfulqa": lambda: f"Q: {question}\nA:",
    }
    return forms.get(name, lambda: f"Question: {question}\nAnswer:")()


def harness_target(doc: Doc) -> int | str:
    """Index of the gold option; of WinoGrande, what follows the blank, which is scored after either option."""
    if doc["benchmark"] == "winogrande":
        return doc["question"].partition("_")[2].strip()
    return 0 if doc["benchmark"] == "truthfulqa" else doc["answer"]


def harness_options(doc: Doc) -> list[str]:
    """The options as they are scored; of WinoGrande, the sentence up to and with each filled blank."""
    name, choices = doc["benchmark"], doc["choices"]
    if name == "winogrande":
        return [doc["question"].partition("_")[0] + text for text in choices]
    if name == "truthfulqa":
        return doc["mc2_choices"]
    if name == "anli":
        return list(ANLI)
    if name == "hellaswag":
        return [hellaswag(text) for text in choices]
    if name == "agieval":
        return [f"({mark}){text}" for mark, text in zip(letters(len(choices)), choices)]
    return list(letters(len(choices))) if name in LETTERED else choices


def generate_text(doc: Doc) -> str:
    """The prompt of a benchmark without options; a BBH exemplar with `lead` begins with the task's instruction."""
    question = doc["question"]
    forms = {
        "gsm8k": lambda: f"Q: {question}\nA:",
        "triviaqa": lambda: f"Question: {question}\nAnswer:",
        "bbh": lambda: f"{doc.get('lead', '')}Q: {question}\n{STEPS}",
        "humaneval": lambda: question,
        "mbpp": lambda: (
            f"You are an expert Python programmer, and here is your task: {question} Your code should pass these tests:"
            f"\n\n{chr(10).join(doc['test_list'])}\n[BEGIN]\n"
        ),
    }
    mathematics = f"Problem:\n{question}\nThink step by step and put the final answer in \\boxed{{}}.\nSolution:"
    return forms.get(doc["benchmark"], lambda: mathematics)()


def generate_target(doc: Doc) -> str:
    """What an exemplar shows after its prompt."""
    name, target, rationale = doc["benchmark"], doc["target"], doc["rationale"]
    if name == "gsm8k":
        return f"{rationale} The answer is {target}."
    if name == "bbh":
        return rationale or target  # of an exemplar, the whole worked answer; of an item, for the log
    return target.replace("\r\n", "\n") + "\n[DONE]" if name == "mbpp" else target


def hellaswag(text: str) -> str:
    """Without the marks of WikiHow, as the stock task does."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _second_sentence(text: str) -> str:
    """Begins the unfinished last sentence with a capital, as the stock task does (the Hub keeps it apart as ctx_b)."""
    return re.sub(r"([.!?\")] +)([a-z][^.]*)$", lambda match: match[1] + match[2].capitalize(), text)


def _listed(options: list[str]) -> str:
    return "\n".join(f"{mark}. {text}" for mark, text in zip(letters(len(options)), options))
