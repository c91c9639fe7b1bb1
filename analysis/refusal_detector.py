"""Trains the refusal detector's weights and measures how often it agrees with people.

    python analysis/refusal_detector.py ../shared/benchmarks_safety

reads XSTest's completions with two annotations (`xstest/`), PyRIT's refusals (`pyrit_refusals/`, never trained on) and
sentences of our own (`analysis/refusal/`: `sentences.jsonl`, which are tested by folds, and `more.jsonl`, which were
written later to learn from and to choose by, and are no test), and writes `phi3_jax/evaluation/refusal_weights.json` and
`analysis/results/refusal_detector.md`. Every number of the table is of replies that the weights behind it did not see.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.optimize import minimize

from phi3_jax import statistics
from phi3_jax.entry import run
from phi3_jax.errors import UserError
from phi3_jax.evaluation import refusal
from phi3_jax.records import files, rows

HERE = Path(__file__).resolve().parent
SENTENCES = HERE / "refusal" / "sentences.jsonl"
MORE_SENTENCES = HERE / "refusal" / "more.jsonl"
TABLE = HERE / "results" / "refusal_detector.md"
WEIGHTS = HERE.parent / "phi3_jax" / "evaluation" / refusal.WEIGHTS
MODELS = ("gpt4", "llama2new", "llama2orig", "mistralinstruct")
OWN, USUAL, MORE = "own", "usual", "more"  # sentences of our own; those in usual words, and later ones, are no test
OWN_WEIGHT = 1.5  # of a sentence of our own, where a completion weighs 1
PENALTY = 0.5  # half the sum of squared weights times this is added to the loss
LEAST = 2  # rows that hold an n-gram, of two sources or all our own: no longer piece of anybody's text is kept
SMALLEST = 0.02  # weight that is kept
FOLDS = 5  # of our own sentences

CLASSES = {"1_full_compliance": refusal.FULL, "2_full_refusal": refusal.REFUSED, "3_partial_refusal": refusal.PARTLY}
PARTIAL = "3_partial_refusal"

Weights = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Reply:
    """A labelled reply: who said it, to which prompt (its id and type), whether it complied."""

    source: str
    id: str
    type: str
    prompt: str
    completion: str
    complied: bool
    safe: bool = True
    partly: bool = False
    string_match: bool | None = None
    gpt4: bool | None = None
    annotators: tuple[bool, bool] | None = None
    gpt4_class: str = ""


def read(folder: Path) -> tuple[list[Reply], list[Reply], list[Reply]]:
    """(XSTest's, PyRIT's, our own)."""
    full = "1_full_compliance"
    found = []
    for model in MODELS:
        for row in lines(folder / "xstest" / f"completions_{model}.jsonl"):
            contrast = row["type"].startswith("contrast_")
            kind = GROUPS.get(row["type"].removeprefix("contrast_"), row["type"].removeprefix("contrast_"))
            both = (row["annotation_1"] == full, row["annotation_2"] == full)
            match, judged = row["string_match"] == full, row["gpt4"] == full
            text = (row["prompt"], row["completion"], row["label"] == full)
            partly = row["label"] == PARTIAL
            found.append(Reply(model, row["id"], kind, *text, not contrast, partly, match, judged, both, row["gpt4"]))
    pyrit = [
        Reply("pyrit", row["id"], row["id"].split("/")[1], row["prompt"], row["completion"], not row["refusal"])
        for row in lines(folder / "pyrit_refusals" / "rows.jsonl")
    ]
    own = [
        Reply(OWN, r["completion"], USUAL if r["usual"] else OWN, r["prompt"], r["completion"], r["complied"])
        for r in lines(SENTENCES)
    ]
    own += [
        Reply(OWN, r["completion"], MORE, r["prompt"], r["completion"], r["complied"]) for r in lines(MORE_SENTENCES)
    ]
    return found, pyrit, own


# Types whose prompts ask the same things are held out together.
GROUPS = {
    "nons_group_real_discr": "discr", "real_group_nons_discr": "discr", "privacy_public": "privacy",
    "privacy_fictional": "privacy",
}  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    found, torn = rows.read(path)
    if not found or torn:
        raise UserError(
            f"{path} is missing, or has {torn} lines that are no JSON; give the folder of benchmarks_safety"
        )
    return found


# ------------------------------------------------------------------------------------------------ training


def train(replies: Sequence[Reply]) -> Weights:
    """Two regressions: complied or not, and of what people labelled as no compliance, partly or not.

    The second learns from XSTest's replies alone: our own sentences are not labelled so.
    """
    second = [reply for reply in replies if not reply.complied and reply.source != OWN]
    return complied(replies) | {"partly": partly(second)}


def partly(replies: Sequence[Reply]) -> Weights:
    """The second regression, without n-grams: how a model words a partial refusal is its own."""
    return fitted(replies, [reply.partly for reply in replies], grams=False)


def complied(replies: Sequence[Reply]) -> Weights:
    """The first regression alone."""
    return fitted(replies, [reply.complied for reply in replies])


def fitted(replies: Sequence[Reply], right: Sequence[bool], grams: bool = True) -> Weights:
    """Logistic regression with an L2 penalty on `refusal.features`, small weights left out.

    Args:
      right: what is to be said of each reply.
      grams: with the n-grams among the features.
    """
    features = [FEATURES(reply) for reply in replies]
    count: Counter[str] = Counter()
    sources = defaultdict(set)
    for reply, found in zip(replies, features, strict=True):
        count.update(found)
        for name in found:
            sources[name].add(reply.source)
    names = sorted(
        n
        for n in count
        if (grams or not n.startswith("g:")) and count[n] >= LEAST and (len(sources[n]) > 1 or sources[n] == {OWN})
    )
    place = {name: i for i, name in enumerate(names)}
    cells = [(i, place[n], x) for i, found in enumerate(features) for n, x in found.items() if n in place]
    row, column, value = zip(*cells, strict=True)
    table = sparse.csr_matrix((value, (row, column)), shape=(len(replies), len(names)))
    sign = np.where(right, 1.0, -1.0)
    weight = np.where([reply.source == OWN for reply in replies], OWN_WEIGHT, 1.0)

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        margin = sign * (table @ x[1:] + x[0])
        slope = -weight * sign / (1 + np.exp(np.clip(margin, -60, 60)))
        gradient = np.concatenate([[slope.sum()], table.T @ slope + PENALTY * x[1:]])
        return float(weight @ np.logaddexp(0, -margin) + PENALTY / 2 * x[1:] @ x[1:]), gradient

    found = minimize(loss, np.zeros(len(names) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 300}).x
    kept = {n: round(float(w), 3) for n, w in zip(names, found[1:], strict=True) if abs(w) >= SMALLEST}
    return {"bias": round(float(found[0]), 3), "features": kept}


def cached() -> Callable[[Reply], dict[str, float]]:
    known: dict[Reply, dict[str, float]] = {}

    def of(reply: Reply) -> dict[str, float]:
        if reply not in known:
            known[reply] = refusal.features(reply.prompt, reply.completion)
        return known[reply]

    return of


FEATURES = cached()


def scores(replies: Sequence[Reply], weights: Weights) -> np.ndarray:
    return refusal.probabilities([(r.prompt, r.completion) for r in replies], weights)


def parts(
    replies: Sequence[Reply], own: Sequence[Reply], types: bool, fit: Callable[[Sequence[Reply]], Weights]
) -> Iterator[tuple[list[int], Weights]]:
    """(numbers of replies, weights that saw neither their model nor, with `types`, their prompts' type) of each part."""
    for model, kind in sorted({(r.source, r.type if types else "") for r in replies}):
        test = [i for i, r in enumerate(replies) if r.source == model and kind in ("", r.type)]
        seen = [r for r in replies if r.source != model and (not types or r.type != kind)]
        yield test, fit([*seen, *own])


def held_out(replies: Sequence[Reply], own: Sequence[Reply], types: bool) -> np.ndarray:
    """P(complied) of each reply by the weights of `parts`."""
    out = np.zeros(len(replies))
    for test, weights in parts(replies, own, types, complied):
        out[test] = scores([replies[i] for i in test], weights)
    return out


def by_model(replies: Sequence[Reply], own: Sequence[Reply]) -> tuple[np.ndarray, list[str]]:
    """(P(complied), the class) of each reply by weights that did not see its model."""
    out, names = np.zeros(len(replies)), [""] * len(replies)
    for test, weights in parts(replies, own, False, train):
        out[test] = scores([replies[i] for i in test], weights)
        found = refusal.labels([(replies[i].prompt, replies[i].completion) for i in test], weights)
        for i, name in zip(test, found, strict=True):
            names[i] = name
    return out, names


def folded(replies: Sequence[Reply], own: Sequence[Reply]) -> np.ndarray:
    """P(complied) of each sentence of our own by weights that did not see its wording; later ones are in every fold's."""
    fold = np.array([FOLDS if r.type == MORE else zlib.crc32(r.completion.encode()) % FOLDS for r in own])
    out = np.zeros(len(own))
    for k in range(FOLDS):
        test = np.flatnonzero(fold == k).tolist()
        weights = complied([*replies, *(r for r, f in zip(own, fold, strict=True) if f != k)])
        out[test] = scores([own[i] for i in test], weights)
    return out


# ------------------------------------------------------------------------------------------------ measuring


def agreement(replies: Sequence[Reply], said: Iterable[bool]) -> statistics.Estimate:
    hits = [r.complied == bool(s) for r, s in zip(replies, said, strict=True)]
    return statistics.proportion(hits, np.array([r.id for r in replies]))


def auc(replies: Sequence[Reply], p: np.ndarray) -> float:
    from scipy.stats import rankdata

    good = np.array([r.complied for r in replies])
    return float((rankdata(p)[good].mean() - (good.sum() + 1) / 2) / (~good).sum())


def errors(replies: Sequence[Reply], p: np.ndarray) -> dict[str, list[float]]:
    """{sensitivity, specificity} for refusals: [mean over models, standard error for a further model]."""
    out = {}
    for name, complied in (("sensitivity", False), ("specificity", True)):
        found = []
        for model in MODELS:
            part = [
                (x > 0.5) == complied
                for r, x in zip(replies, p, strict=True)
                if (r.source, r.complied) == (model, complied)
            ]
            found.append(float(np.mean(part)))
        spread = np.std(found, ddof=1) * np.sqrt(1 + 1 / len(found))
        out[name] = [round(float(np.mean(found)), 4), round(float(spread), 4)]
    return out


def table(
    xstest: Sequence[Reply], pyrit: Sequence[Reply], own: Sequence[Reply], weights: Weights
) -> tuple[str, Weights]:
    """(the table of docs/safety.md, the weights with their error)."""
    (model_out, names), both_out, mine = by_model(xstest, own), held_out(xstest, own, True), folded(xstest, own)
    by_type = [("XSTest, model held out", xstest, model_out, True)]
    groups: list[tuple[str, Sequence[Reply], np.ndarray, bool]] = []
    for model in MODELS:
        at = [i for i, r in enumerate(xstest) if r.source == model]
        groups.append((f"- {model}", [xstest[i] for i in at], model_out[at], True))
    others = [("XSTest, model and prompt type held out", xstest, both_out, True)]
    others.append(("PyRIT's refusals, never trained on", pyrit, scores(pyrit, weights), False))
    odd = [i for i, r in enumerate(own) if r.type == OWN]
    rare = [own[i] for i in odd]
    others.append(("unusual wordings of our own, wording held out", rare, mine[odd], False))
    later = [r for r in own if r.type == MORE]
    without = scores(rare, complied([*xstest, *later]))
    others.append(("- by weights that saw XSTest and the later sentences alone", rare, without, False))
    others.append(
        (
            "later sentences, which chose features, by weights without them",
            later,
            scores(later, complied([*xstest, *rare])),
            False,
        )
    )
    out = ["| replies | n | agreement % | 95 % | AUC | string match % | GPT-4 % | safe refused: detector / people % |"]
    out.append("| --- " * 8 + "|")
    for name, replies, p, known in (*by_type, *groups, *others):
        found = agreement(replies, p > 0.5)
        cells = [
            name,
            str(len(replies)),
            f"{100 * found.value:.1f}",
            f"{100 * found.low:.1f} to {100 * found.high:.1f}",
        ]
        cells.append(f"{auc(replies, p):.3f}")
        if known:
            cells += [
                f"{100 * agreement(replies, (bool(getattr(r, x)) for r in replies)).value:.1f}"
                for x in ("string_match", "gpt4")
            ]
            safe = [(x, r.complied) for r, x in zip(replies, p, strict=True) if r.safe]
            shares = np.mean([x <= 0.5 for x, _ in safe]), np.mean([not c for _, c in safe])
            cells.append(" / ".join(f"{100 * share:.1f}" for share in shares))
        else:
            cells += ["-"] * 3
        out.append(f"| {' | '.join(cells)} |")
    people = np.mean([a == b for r in xstest if r.annotators for a, b in [r.annotators]])
    begin = time.process_time()
    scores(xstest[::9], weights)
    spent = 1000 * (time.process_time() - begin) / len(xstest[::9])
    out.append("")
    out.append(
        f"Two people agree on {100 * people:.1f} % of XSTest's replies. A reply takes {spent:.1f} ms of one core."
    )
    out += ["", *three_way(xstest, names)]
    return "\n".join(out) + "\n", weights | {"error": errors(xstest, model_out)}


def three_way(replies: Sequence[Reply], said: Sequence[str]) -> list[str]:
    """A table of the three classes, people's in rows and the detector's in columns, and how often both agree."""
    names = (refusal.FULL, refusal.PARTLY, refusal.REFUSED)
    people = [refusal.FULL if r.complied else refusal.PARTLY if r.partly else refusal.REFUSED for r in replies]
    out = ["| people \\ detector, model held out | complied | partly | refused | n |", "| --- " * 5 + "|"]
    for name in names:
        counts = [sum((a, b) == (name, other) for a, b in zip(people, said, strict=True)) for other in names]
        out.append(f"| {name} | {' | '.join(map(str, counts))} | {sum(counts)} |")
    ids = np.array([r.id for r in replies])

    def share(found: Iterable[bool]) -> str:
        e = statistics.proportion(list(found), ids)
        return f"{100 * e.value:.1f} % [{100 * e.low:.1f}, {100 * e.high:.1f}]"

    detector = share(a == b for a, b in zip(people, said, strict=True))
    string = share(
        a == (refusal.FULL if r.string_match else refusal.REFUSED) for a, r in zip(people, replies, strict=True)
    )
    gpt4 = share(a == CLASSES.get(r.gpt4_class) for a, r in zip(people, replies, strict=True))
    return [*out, "", f"Three classes: the detector {detector}, string match {string}, GPT-4 {gpt4}."]


def main(words: Sequence[str]) -> int:
    """The command."""
    if len(words) != 1 or not Path(words[0]).is_dir():
        raise UserError("give one folder that holds xstest/ and pyrit_refusals/")
    xstest, pyrit, own = read(Path(words[0]))
    text, weights = table(xstest, pyrit, own, train([*xstest, *own]))
    about = (
        "Trained on XSTest's completions of GPT-4, Llama-2 (two system prompts) and Mistral-7B-Instruct with the labels of "
        "its annotators (Röttger et al. 2024, CC BY 4.0), and on sentences of our own. n-grams of up to three words; no "
        "completion is contained. A detector, not a language model."
    )
    files.write_json(WEIGHTS, {"about": about} | weights, indent=None)
    command = "`python analysis/refusal_detector.py ../shared/benchmarks_safety`"
    files.write_text(TABLE, f"# The refusal detector compared with people\n\nMade by {command}.\n\n{text}")
    print(text)
    print(f"{len(weights['features'])} weights in {WEIGHTS.name}")
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main))
