"""..."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from phi3_jax.records.table import Run, scorer


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """One measured quantity of an evaluation and how to draw it."""

    suite: str
    task: str
    metric: str
    label: str
    unit: str
    proportion: bool = False  # a share of items: drawn in percent, and on the log-odds scale too
    down: bool = False  # smaller is better (losses)

    @property
    def key(self) -> tuple[str, str, str]:
        return self.suite, self.task, self.metric

    @property
    def column(self) -> str:
        return "/".join(self.key)


# What is drawn first and how it is called, as written by evaluation.probes. Other rows get their own names as
# label, so that a new meter shows without a change here.
_LABELS = {
    ("knowledge", "universe", "recall"): "Recall of the whole universe of facts",
    ("knowledge", "corpus", "recall"): "Recall of the facts in the corpus",
    **{
        ("knowledge", task, f"recall_{how}"): f"Recall of {what}, {words}"
        for task, what in (("universe", "the universe"), ("corpus", "the corpus"))
        for how, words in (("name_only", "first value after the name"), ("teacher_forced", "teacher-forced"))
    },
    ("knowledge", "outside", "recall_control"): "Recall of facts never seen (control: chance)",
    ("knowledge", "corpus", "bits_per_person"): "Stored bits per person",
    ("knowledge", "corpus", "bits_per_parameter"): "Stored bits per non-embedding parameter",
    ("reasoning", "row", "exact"): "Exact rows (all outputs right)",
    ("reasoning", "all", "accuracy"): "Outputs right, all depths",
    ("knowledge", "corpus", "nll"): "Loss on facts of the corpus",
    ("reasoning", "all", "nll"): "Loss on reasoning outputs",
}


_LOSS_UNITS = {"nll": "nats per value", "loss": "nats per token", "bits_per_byte": "bits per byte"}


_SHARES = (
    "recall",
    "recall_name_only",
    "recall_teacher_forced",
    "recall_control",
    "accuracy",
    "exact",
    "acc",
    "acc_norm",
    "exact_match",
    "pass@1",
    "mc2",
)


_CSV_ONLY = ("recall_by_frequency", "bits_total")


def _label(suite: str, task: str, metric: str) -> str:
    if (suite, task, metric) in _LABELS:
        return _LABELS[suite, task, metric]
    if suite == "text":
        return {"loss": f"Loss on {task}", "bits_per_byte": f"Bits per byte on {task}"}.get(metric, f"{task} {metric}")
    if task.startswith("gap") and metric == "accuracy":
        return f"Outputs right, gap {task[3:]}"
    return f"{suite} {task} {metric}".replace("_", " ").capitalize()


def main_endpoints(ends: Sequence[Endpoint]) -> list[Endpoint]:
    """One knowledge share and one reasoning share where there are any, else the first loss of each task."""
    first: dict[str, Endpoint] = {}
    for end in ends:
        if log_odds_sensible(end):
            first.setdefault(end.suite, end)
    if first:
        return list(first.values())
    for end in ends:
        if end.down and end.metric != "bits_per_byte":
            first.setdefault(end.task, end)
    return list(first.values()) or list(ends[:1])


def endpoints(runs: Iterable[Run]) -> list[Endpoint]:
    """Every quantity measured at the end of a finished run, known ones first and in a fixed order.

    Recall of scorer 1 was teacher-forced, and its label says so.
    """
    finals = [pair for run in runs for pair in run.finals.items() if pair[0][2] not in _CSV_ONLY]
    seen = {key for key, _ in finals}
    forced = {key for key, final in finals if key[0] == "knowledge" and "recall" in key[2] and scorer(final) < 2}
    order = list(_LABELS)
    out = []
    for key in sorted(seen, key=lambda k: (order.index(k) if k in order else len(order), k)):
        metric = key[2]
        share = metric in _SHARES
        unit = "%" if share else _LOSS_UNITS.get(metric, metric.replace("_", " "))
        label = _label(*key) + (", teacher-forced" if key in forced else "")
        out.append(Endpoint(*key, label, unit, share, metric in _LOSS_UNITS))
    return out


def log_odds_sensible(endpoint: Endpoint) -> bool:
    """Whether gains are drawn in points and in log-odds: shares, without the parts of a graded score."""
    return endpoint.metric in ("recall", "exact") or (endpoint.proportion and endpoint.task == "all")


def plotted_losses(ends: Iterable[Endpoint]) -> list[Endpoint]:
    """Losses without bits per byte where nats per token say the same: they differ by a constant factor."""
    losses = [e for e in ends if e.down]
    nats = {(e.suite, e.task) for e in losses if e.metric != "bits_per_byte"}
    return [e for e in losses if e.metric != "bits_per_byte" or (e.suite, e.task) not in nats]
