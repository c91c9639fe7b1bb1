"""A study folder as rows: its runs, their final scores over seeds, and the gains between the sizes (no jax).

A study is read as it lies on disk, whatever is there: nothing here raises on a run that misses a file, was
stopped half way or has a broken line; `Study.missing` says in words what was left out.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError

MEMBERS = ("mini", "small", "medium")
# Parameters of the released models as the Phi-3 report rounds them.
PUBLISHED = {"mini": "3.8B", "small": "7B", "medium": "14B"}


def human(count: float | None, digits: int = 3) -> str:
    """Short form of a count: 416000 -> '416k', 4.8e12 -> '4.8T', None -> '–'."""
    if count is None or not math.isfinite(count):
        return "–"
    count = float(f"{count:.{digits}g}")  # first, so that 999,936 is 1M and not 1000k
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size <= abs(count) < 1e15:
            return f"{count / size:.{max(digits, 3)}g}{unit}"
    return f"{count:.{max(digits, 3)}g}"


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.exists():
        return {}, f"has no {path.name}"
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}, f"has an unreadable {path.name}"
    return (value, None) if isinstance(value, dict) else ({}, f"has a {path.name} that is no table")


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Whole JSON lines of a file; a line cut by a crash is dropped and said."""
    if not path.exists():
        return [], f"has no {path.name}"
    rows, bad = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            bad += 1
    return rows, f"has {bad} unreadable line(s) in {path.name}" if bad else None


def number(value: Any) -> float | None:
    """A finite number of a JSON file, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


@dataclasses.dataclass
class Run:
    """One run folder; every field is None or empty where the folder does not say."""

    folder: Path
    record: dict[str, Any]
    plan: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    status_file: dict[str, Any]

    def field(self, *names: str) -> Any:
        """First value found under one of the names in config, config.model, the record itself or the plan."""
        config = self.record.get("config")
        config = config if isinstance(config, dict) else {}
        model = config.get("model")
        places = [config, model if isinstance(model, dict) else {}, self.record, self.plan]
        for name in names:
            for place in places:
                if place.get(name) is not None:
                    return place[name]
        return None

    @cached_property
    def name(self) -> str:
        return str(self.record.get("name") or self.folder.name)

    @cached_property
    def member(self) -> str:
        return str(self.field("member") or "?")

    @cached_property
    def scale(self) -> str:
        return str(self.field("scale") or "?")

    @cached_property
    def ladder(self) -> str:
        return str(self.field("ladder") or "?")

    @cached_property
    def arm(self) -> str:
        return str(self.field("arm") or "")

    @cached_property
    def label(self) -> str:
        return str(self.record.get("label") or self.field("label") or self.name)

    @cached_property
    def non_embedding(self) -> float | None:
        return number(self.field("non_embedding", "matrix_params"))

    @cached_property
    def parameters(self) -> float | None:
        return number(self.field("parameters", "total_parameters"))

    @cached_property
    def size(self) -> float | None:
        """The size a figure plots: non-embedding parameters, or all where only those are known."""
        return self.non_embedding or self.parameters

    @cached_property
    def published(self) -> float | None:
        return number(self.field("published_parameters"))

    @cached_property
    def seed(self) -> int:
        return int(number(self.field("seed")) or 0)

    @cached_property
    def parent(self) -> str | None:
        return self.field("parent")

    @cached_property
    def steps(self) -> int | None:
        steps = number(self.field("steps"))
        return int(steps) if steps else None

    @cached_property
    def budget(self) -> float | None:
        """Tokens the run is meant to end with."""
        budget = number(self.field("budget", "tokens"))
        if budget:
            return budget
        data = self.field("data")
        window = number(data.get("window")) if isinstance(data, dict) else None
        windows = number(self.field("batch_windows"))
        return self.steps * windows * window if self.steps and windows and window else None

    @cached_property
    def budget_group(self) -> str:
        """Budgets that differ only by the rounding to whole steps share a name, e.g. '4M'."""
        return human(self.budget, 2)

    @cached_property
    def data_name(self) -> str:
        data = self.field("data")
        if not isinstance(data, dict):
            return str(data or "")
        return str(data.get("name") or Path(str(data.get("source") or "")).name)

    @cached_property
    def data_fingerprint(self) -> str:
        data = self.field("data")
        return str(data.get("fingerprint") or "") if isinstance(data, dict) else ""

    def last(self, key: str) -> float | None:
        """Newest finite value of a metric."""
        for row in reversed(self.metrics):
            value = number(row.get(key))
            if value is not None:
                return value
        return None

    @cached_property
    def step(self) -> int:
        return int(max((number(r.get("step")) or 0 for r in self.metrics + self.evals), default=0))

    @cached_property
    def status(self) -> str:
        """'finished', or in words why the run's scores are not used."""
        written = str(self.status_file.get("status") or "")
        if written in ("failed", "diverged"):
            reason = self.status_file.get("reason")
            return f"failed: {reason}" if reason else "failed"
        if not self.record:
            return "no config"
        if not self.metrics and not self.evals:
            return "not started"
        if self.steps and self.step < self.steps:
            return f"unfinished: step {self.step:,} of {self.steps:,}"
        losses = [r["loss"] for r in self.metrics if "loss" in r]
        if losses and number(losses[-1]) is None:
            return f"failed: loss is not finite at step {self.step:,}"
        return "finished"

    @property
    def finished(self) -> bool:
        return self.status == "finished"

    @cached_property
    def finals(self) -> dict[tuple[str, str, str], dict[str, Any]]:
        """Rows of the evaluation at the run's end by (suite, task, metric); none before the run has ended."""
        if not self.finished or not self.evals:
            return {}
        newest = max(number(r.get("step")) or 0 for r in self.evals)
        if self.steps and newest < self.steps:
            return {}
        return {
            (str(r.get("suite")), str(r.get("task")), str(r.get("metric"))): r
            for r in self.evals
            if (number(r.get("step")) or 0) == newest and number(r.get("value")) is not None
        }


@dataclasses.dataclass
class Study:
    """A study folder that was read: `study.json`, runs in the order mini to medium, and what is missing."""

    folder: Path
    meta: dict[str, Any]
    runs: list[Run]
    missing: list[str]

    @cached_property
    def arms(self) -> dict[str, list[Run]]:
        """Runs that may be compared: of one arm, or where the study names none, of one scale, ladder and data."""
        if any(run.arm for run in self.runs):
            return {arm: [r for r in self.runs if r.arm == arm] for arm in dict.fromkeys(r.arm for r in self.runs)}
        arms: dict[tuple[str, ...], list[Run]] = {}
        for run in self.runs:
            arms.setdefault((run.scale, run.ladder, run.data_name, run.data_fingerprint), []).append(run)
        named: dict[str, list[Run]] = {}
        for (scale, ladder, data, fingerprint), runs in arms.items():
            name = f"{scale} scale, {ladder} ladder"
            if len({(k[2], k[3]) for k in arms}) > 1:
                same_name = len({k[3] for k in arms if k[2] == data}) > 1
                name += f", data {data or 'unnamed'}" + (f" {fingerprint[:6]}" if same_name else "")
            named.setdefault(name, []).extend(runs)
        return named

    @cached_property
    def unmatched(self) -> bool:
        """Whether some budget name joins different numbers of tokens (`tokens=published`)."""
        return any("/" in run.budget_group for run in self.runs)

    @cached_property
    def lines(self) -> list[str]:
        """What the full run would be: the lines of study.json's "full"."""
        return list(_flat(self.meta.get("full")))


def _flat(value: Any, prefix: str = "") -> Iterable[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{key}: ")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _flat(inner, prefix)
    elif value is not None:
        yield from (f"{prefix}{line}" for line in str(value).splitlines() if line.strip())


def read_study(folder: Path) -> Study:
    """Reads `runs/<study>/`: every sub-folder with a config, plan, metrics or evals file is a run.

    Raises:
      UserError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"study folder {folder} does not exist; give a folder that holds the runs of a study")
    meta, problem = _read_json(folder / "study.json")
    missing = [f"the study folder {problem}"] if problem else []
    runs = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("data", "figures")):
        if not any((path / f).exists() for f in ("config.json", "plan.json", "metrics.jsonl", "evals.jsonl")):
            continue
        record, no_config = _read_json(path / "config.json")
        plan, no_plan = _read_json(path / "plan.json")
        metrics, no_metrics = _read_lines(path / "metrics.jsonl")
        evals, no_evals = _read_lines(path / "evals.jsonl")
        status, _ = _read_json(path / "status.json")
        run = Run(path, record, plan, metrics, evals, status)
        problems = [p for p in (no_config, no_plan, no_metrics, no_evals) if p]
        if not run.finished:
            problems.insert(0, f"is {run.status}" if "failed" not in run.status else run.status)
        elif not run.finals and not no_evals:
            problems.append("has no evaluation at its last step")
        missing += [f"run {path.name} {'; '.join(problems)}"] if problems else []
        runs.append(run)
    here = {run.folder.name for run in runs}
    planned = meta.get("runs") if isinstance(meta.get("runs"), list) else []
    names = [str(r.get("name") if isinstance(r, dict) else r) for r in planned]
    missing += [f"run {name} is planned and not started" for name in names if name not in here]
    runs.sort(key=lambda r: (r.scale, r.ladder, r.data_name, r.size or 0, r.budget or 0, r.seed, r.name))
    if not runs:
        missing.append("no run folder was found")
    study = Study(folder, meta, runs, missing)
    for arm in study.arms.values():
        _name_unmatched_budgets(arm)
    return study


def _name_unmatched_budgets(runs: list[Run]) -> None:
    """Joins budgets by rank, as '2.8M/4M/4M', where the three sizes saw different numbers of tokens."""
    by_member = {m: sorted({r.budget for r in runs if r.member == m and r.budget}) for m in MEMBERS}
    names = {tuple(human(b, 2) for b in values) for values in by_member.values()}
    if len(names) == 1 or len({len(values) for values in by_member.values()}) > 1:
        return
    for ranked in zip(*by_member.values(), strict=True):
        name = "/".join(human(b, 2) for b in ranked)
        for run in runs:
            if run.member in MEMBERS and run.budget == ranked[MEMBERS.index(run.member)]:
                run.budget_group = name


def what_was_trained(runs: Iterable[Run]) -> str:
    """The plain label of some runs: proxies are called proxies, and nothing is called a released model."""
    parts = []
    runs = list(runs)
    for scale, ladder in dict.fromkeys((r.scale, r.ladder) for r in runs):
        here = {r.member for r in runs if (r.scale, r.ladder) == (scale, ladder)}
        names = ", ".join(f"phi-3-{m}" for m in MEMBERS if m in here)
        others = len(here - set(MEMBERS))
        between = f"{others} size{'s' * (others > 1)} around them" if names else f"{others} in-between size(s)"
        who = " and ".join(filter(None, (names, between if others else "")))
        if scale == "full":
            parts.append(f"Full published shapes of {who}, trained here: not Microsoft's released weights")
        else:
            parts.append(f"Proxies at {scale} scale of {who} ({ladder} ladder), NOT the released models")
    return "; ".join(parts) or "No run"


COLUMNS = (
    "name", "label", "arm", "member", "scale", "ladder", "data", "seed", "non_embedding", "parameters",
    "published_parameters", "budget", "tokens", "steps", "flops", "flops_predicted", "seconds",
    "seconds_predicted", "peak_bytes", "peak_bytes_predicted", "tokens_per_s", "compile_s", "skipped",
    "train_loss", "status", "parent", "device", "git_commit", "fingerprint",
)  # fmt: skip


def row(run: Run) -> dict[str, Any]:
    """One run as a flat row: `COLUMNS`, then `suite/task/metric` of its final evaluation."""
    speeds = sorted(v for r in run.metrics[1:] or run.metrics if (v := number(r.get("tokens_per_s"))) is not None)

    def measured(*names: str) -> float | None:
        found = (number(run.status_file.get(n)) or run.last(n) for n in names)
        return next((v for v in found if v is not None), None)

    def planned(*names: str) -> float | None:
        return next((v for n in names if (v := number(run.plan.get(n))) is not None), None)

    values = {
        "name": run.name, "label": run.label, "arm": run.arm, "member": run.member, "scale": run.scale,
        "ladder": run.ladder, "data": run.data_name, "seed": run.seed, "non_embedding": run.non_embedding,
        "parameters": run.parameters,
        "published_parameters": run.published, "budget": run.budget, "tokens": run.last("tokens"),
        "steps": run.step, "flops": run.last("flops"), "flops_predicted": planned("flops", "total_flops"),
        "seconds": measured("seconds", "wall_s"), "seconds_predicted": planned("seconds", "wall_s"),
        "peak_bytes": measured("peak_bytes"), "peak_bytes_predicted": planned("peak_bytes", "memory_bytes"),
        "tokens_per_s": speeds[len(speeds) // 2] if speeds else None, "compile_s": measured("compile_s"),
        "skipped": run.last("skipped"), "train_loss": run.last("loss"), "status": run.status,
        "parent": run.parent,
        "device": run.record.get("device"), "git_commit": run.record.get("git_commit"),
        "fingerprint": run.record.get("fingerprint"),
    }  # fmt: skip
    finals = {"/".join(key): r["value"] for key, r in run.finals.items()}
    items = {f"{'/'.join(key)}/n": r.get("n") for key, r in run.finals.items() if key[2] in ("recall", "exact")}
    return values | finals | items


def write_csv(study: Study, path: Path) -> Path:
    """Writes `runs.csv`: one line a run, every column of `row`, empty where a run has no value."""
    rows = [row(run) for run in study.runs]
    extra = sorted({key for r in rows for key in r} - set(COLUMNS))
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS, *extra], restval="")
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in r.items()} for r in rows)
    return Path(path)
