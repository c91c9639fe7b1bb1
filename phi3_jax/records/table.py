"""A study folder as rows: its runs, their final scores over seeds, and the gains between the sizes (no jax).

A study is read as it lies on disk, whatever is there: nothing here raises on a run that misses a file, was
stopped half way or has a broken line; `Study.missing` says in words what was left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.family import MEMBERS, SIZES, TRIO
from phi3_jax.records import tables
from phi3_jax.records.files import read_state
from phi3_jax.records.rows import read, read_rows
from phi3_jax.units import human_count, number


def _read_json(path: Path) -> tuple[dict[str, Any], str | None]:
    if not path.exists():
        return {}, f"has no {path.name}"
    value = read_state(path)
    return value, None if value else f"has an unreadable {path.name}"


def _read_meta(path: Path) -> tuple[dict[str, Any], str | None]:
    """study.json without what has another type than it should have."""
    meta, problem = _read_json(path)
    kinds = {"name": str, "title": str, "command": str, "design": dict, "runs": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name) or kind(), kind)]
    meta = {name: value for name, value in meta.items() if isinstance(value, kinds.get(name, object))}
    if not isinstance(meta.get("design", {}).get("config") or {}, dict):
        wrong.append("design.config")
        meta["design"] = {name: value for name, value in meta["design"].items() if name != "config"}
    return meta, f"has a study.json with an unreadable {' and '.join(wrong)}" if wrong else problem


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Whole JSON lines of a file; a line cut by a crash is dropped and said."""
    if not path.exists():
        return [], f"has no {path.name}"
    try:
        _, bad = read(path)
    except OSError as error:
        return [], f"has {path.name}, which cannot be read ({error.strerror or error})"
    return read_rows(path), f"has {bad} unreadable line(s) in {path.name}" if bad else None


@dataclasses.dataclass
class Run:
    """One run folder; every field is None or empty where the folder does not say."""

    folder: Path
    record: dict[str, Any]
    plan: dict[str, Any]
    metrics: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    status_file: dict[str, Any]
    planned: dict[str, Any] = dataclasses.field(default_factory=dict)  # as study.json has it

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
        """The released model or size that it stands for; of a model from elsewhere its name."""
        found = self.field("member")
        return "?" if found is None else str(found or self.label)

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
        """What was asked for, e.g. '4M'; where a run does not say, two digits of its budget, which is whole batches."""
        asked = number(self.field("asked")) or number(self.planned.get("asked"))
        return human_count(asked) if asked else human_count(self.budget, 2)

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
        found = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"study folder {folder} {found}; give a folder that holds the runs of a study")
    meta, problem = _read_meta(folder / "study.json")
    missing = [f"the study folder {problem}"] if problem else []
    listed = meta.get("runs")
    listed = [r if isinstance(r, dict) else {"name": r} for r in (listed if isinstance(listed, list) else ())]
    planned = {str(r.get("name")): r for r in listed}
    runs = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and p.name not in ("data", "figures")):
        if not any((path / f).exists() for f in ("config.json", "plan.json", "metrics.jsonl", "evals.jsonl")):
            continue
        run, problems = read_run(path, planned.get(path.name, {}))
        no_evals = any("evals.jsonl" in problem for problem in problems)
        if not run.finished:
            problems.insert(0, f"is {run.status}" if "failed" not in run.status else run.status)
        elif not run.finals and not no_evals:
            problems.append("has no evaluation at its last step")
        missing += [f"run {path.name} {'; '.join(problems)}"] if problems else []
        runs.append(run)
    here = {run.folder.name for run in runs}
    missing += [f"run {name} is planned and not started" for name in planned if name not in here]
    runs.sort(key=lambda r: (r.scale, r.ladder, r.data_name, r.size or 0, r.budget or 0, r.seed, r.name))
    if not runs:
        missing.append("no run folder was found")
    study = Study(folder, meta, runs, missing)
    for arm in study.arms.values():
        _name_unmatched_budgets(arm)
    return study


def read_run(path: Path, planned: dict[str, Any] | None = None) -> tuple[Run, list[str]]:
    """A run's folder, and what is wrong with its files, each in words that name the file; `planned` is study.json's row."""
    record, no_config = _read_json(path / "config.json")
    plan, no_plan = _read_json(path / "plan.json")
    metrics, no_metrics = _read_lines(path / "metrics.jsonl")
    evals, no_evals = _read_lines(path / "evals.jsonl")
    status, _ = _read_json(path / "status.json")
    run = Run(path, record, plan, metrics, evals, status, planned or {})
    return run, [p for p in (no_config, no_plan, no_metrics, no_evals) if p]


def _name_unmatched_budgets(runs: list[Run]) -> None:
    """Joins budgets by rank, as '2.8M/4M/4M', where the three sizes saw different numbers of tokens."""
    by_member = {m: {r.budget: r.budget_group for r in runs if r.member == m and r.budget} for m in TRIO}
    named = [[names[budget] for budget in sorted(names)] for names in by_member.values()]
    if all(names == named[0] for names in named) or len({len(names) for names in named}) > 1:
        return
    joined = ["/".join(ranked) for ranked in zip(*named, strict=True)]
    for run in runs:
        if run.member in TRIO and run.budget:
            run.budget_group = joined[sorted(by_member[run.member]).index(run.budget)]


def what_was_trained(runs: Iterable[Run]) -> str:
    """The plain label of some runs: proxies are called proxies, and nothing is called a released model."""
    parts = []
    runs = list(runs)
    for scale, ladder in dict.fromkeys((r.scale, r.ladder) for r in runs):
        here = {r.member for r in runs if (r.scale, r.ladder) == (scale, ladder)}
        if scale == "full" and (others_own := sorted(here - {*SIZES, *MEMBERS})):
            parts.append(f"{', '.join(others_own)}, no released model's shape, trained here")
            here -= set(others_own)
        if not here:
            continue
        names = ", ".join(f"phi-3-{m}" for m in MEMBERS if m in here)
        others = len(here - set(MEMBERS))
        between = f"{others} size{'s' * (others > 1)} around them" if names else f"{others} in-between size(s)"
        who = " and ".join(filter(None, (names, between if others else "")))
        if scale == "full":
            parts.append(f"Full published shapes of {who}, trained here: not Microsoft's released weights")
        else:
            parts.append(f"Proxies at {scale} scale of {who} ({ladder} ladder), NOT the released models")
    given = sorted({str(r.field("init")) for r in runs if r.field("init")})
    return ("; ".join(parts) or "No run") + (f"; started from the weights of {', '.join(given)}" if given else "")


COLUMNS = (
    "name", "label", "arm", "member", "scale", "ladder", "data", "seed", "non_embedding", "parameters",
    "published_parameters", "budget", "tokens", "steps", "flops", "flops_predicted", "seconds",
    "seconds_predicted", "peak_bytes", "peak_bytes_predicted", "tokens_per_s", "compile_s", "skipped",
    "train_loss", "status", "parent", "device", "git_commit", "build", "dirty", "scorer", "fingerprint",
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
        "device": run.record.get("device"),
        **{key: run.record.get(key) for key in ("git_commit", "build", "dirty", "fingerprint")},
        "scorer": max((scorer(final) for final in run.finals.values()), default=None),
    }  # fmt: skip
    finals = {"/".join(key): r["value"] for key, r in run.finals.items()}
    items = {f"{'/'.join(key)}/n": r.get("n") for key, r in run.finals.items() if key[2] in ("recall", "exact")}
    return values | finals | items


def scorer(final: dict[str, Any]) -> int:
    """The version of what scored a row of evals.jsonl; rows of before there were versions are of version 1."""
    return int(number(final.get("scorer")) or 1)


def same_scorers(study: Study) -> None:
    """Refuses a study whose final scores of one task were counted by different versions of its scorer.

    Raises:
      UserError: one line that names the task, the versions, and the runs to evaluate again.
    """
    found: dict[tuple[str, str], dict[int, list[str]]] = {}
    for run in study.runs:
        for (suite, task, _), final in run.finals.items():
            names = found.setdefault((suite, task), {}).setdefault(scorer(final), [])
            names += [run.name] if run.name not in names else []
    for (suite, task), versions in found.items():
        if len(versions) > 1:
            *old, newest = sorted(versions)
            behind = [name for version in old for name in versions[version]]
            raise UserError(
                f"{study.folder} mixes scores of {suite}/{task} by scorers {' and '.join(map(str, sorted(versions)))}, "
                f"which do not compare; evaluate {', '.join(behind[:4])}{' and others' * (len(behind) > 4)} again, so that "
                f"all have scorer {newest}"
            )


def write_csv(study: Study, path: Path) -> Path:
    """Writes `runs.csv`: one line per run, every column of `row`, empty where a run has no value; see `same_scorers`."""
    same_scorers(study)
    rows = [row(run) for run in study.runs]
    extra = sorted({key for r in rows for key in r} - set(COLUMNS))
    tables.write(Path(path), [*COLUMNS, *extra], rows)
    return Path(path)


def keep_finished(folder: Path, names: Iterable[str], path: Path) -> None:
    """Adds a line to the table `path` for each run of `names` in a study that is finished and not there yet.

    A run is there where a line has its name and fingerprint; lines of other studies and machines stay.
    """
    old = list(tables.read(path)) if path.is_file() else []
    there = {(line["name"], line["fingerprint"]) for line in old}
    new = []
    for name in names:
        run = read_run(folder / name)[0]
        if run.finished and run.finals and (name, run.record.get("fingerprint")) not in there:
            new.append({key: _short(value) for key, value in row(run).items()})
    if new:
        extra = sorted({key for line in [*old, *new] for key in line} - set(COLUMNS))
        path.parent.mkdir(parents=True, exist_ok=True)
        tables.write(path, [*COLUMNS, *extra], [*old, *new])


def kept(path: Path, build: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(name, fingerprint) of the finished runs in a table of `keep_finished` that this very code made, unchanged.

    Args:
      build: of the code, as `records.folder.build` says it; none are its own where it has changes or is in no repository.
    """
    if not path.is_file() or not build["build"] or build["dirty"]:
        return set()
    own = {"status": "finished", "build": build["build"], "dirty": "False"}
    lines = (line for line in tables.read(path) if all(line.get(key) == value for key, value in own.items()))
    return {(line["name"], line["fingerprint"]) for line in lines}


def _short(value: Any) -> Any:
    return f"{value:.8g}" if isinstance(value, float) else value
