"""The command `launch/evaluate.py`: a model, a suite, a table, and rows in evals.jsonl."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phi3_jax import commands, loading
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import mt_bench, statistics, suites
from phi3_jax.interop import huggingface, quantized
from phi3_jax.training import checkpoint, metrics, streaming

FLAGS = {
    **dict.fromkeys(("model", "suite", "tasks", "scoring", "limit", "data_dir", "batch", "seed"), str),
    **dict.fromkeys(("judge", "judge_model", "out"), str),
    **dict.fromkeys(("chat", "allow_code_execution"), bool),
}
SCORINGS = ("both", "letter", "harness")
LM_EVAL = "lm-eval"
MT_BENCH = "mt_bench"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """What is evaluated: `path` for `phi3_jax.load`, the name and step of the model, where it lies on a study's axes.

    `identity` changes with the weights; `out` is where results go by default.
    """

    path: str
    name: str
    axes: Mapping[str, Any]
    identity: str
    out: Path
    unfinished: str | None = None


def command(arguments: Sequence[str]) -> None:
    """The command."""
    run(_flags(arguments))


def _flags(arguments: Sequence[str]) -> dict[str, Any]:
    flags: dict[str, Any] = {"suite": "phi3_report", "scoring": "both", "batch": "8", "seed": "0"}
    flags |= commands.parse(arguments, FLAGS, ("model",), "--model runs/phi3-mini --suite phi3_report")
    for name, least in (("limit", 1), ("batch", 1), ("seed", 0)):
        if name in flags:
            if not flags[name].isascii() or not flags[name].isdigit() or int(flags[name]) < least:
                raise UserError(f"--{name} {flags[name]} must be an integer, {least} or more")
            flags[name] = int(flags[name])
    if flags["scoring"] not in SCORINGS:
        raise UserError(f"unknown scoring {flags['scoring']!r}{nearest(flags['scoring'], SCORINGS)}")
    if ("judge" in flags) != ("judge_model" in flags):
        lost = "judge_model" if "judge" in flags else "judge"
        raise UserError(f"--{lost} missing; a judge is a server and one of its models: --judge URL --judge_model NAME")
    if "data_dir" in flags and not Path(flags["data_dir"]).is_dir():
        raise UserError(f"--data_dir {flags['data_dir']} is no folder; give one that holds <benchmark>/test.jsonl")
    return flags


# ---------------------------------------------------------------------------------------------------- the run


def run(flags: Mapping[str, Any]) -> list[Row]:
    """Evaluates, writes and prints; the rows. Everything a user can get wrong is checked before the model is loaded."""
    judge = mt_bench.Endpoint(flags["judge"], flags["judge_model"]) if "judge" in flags else None
    names, with_mt_bench = _names(flags)
    questions = _questions(flags) if with_mt_bench else []
    if judge is not None and not questions:
        raise UserError("--judge rates MT-Bench only; add --tasks mt_bench (and --data_dir), or leave it out")
    source = locate(flags["model"])
    out = Path(flags.get("out", source.out))
    if source.unfinished and out.resolve() == source.out.resolve():
        raise UserError(f"{source.unfinished}, and evals.jsonl there is its trainer's; give --out DIR")
    _quiet()
    from phi3_jax.evaluation import harness  # says how to install lm-eval where it is not

    suite, tasks = _build(flags, names) if names != [] else (None, {})
    if not tasks and not questions:
        raise UserError(f"no benchmark of {flags['suite']} can run with these flags; give --data_dir or name --tasks")
    from phi3_jax.inference.engine import Engine

    engine = Engine(loading.load(source.path), batch=flags["batch"])
    lm = harness.HarnessLM(engine, flags["batch"], _progress, flags["seed"])
    base = {**source.axes, "model": source.name, "chat": bool(flags.get("chat")), "limit": flags.get("limit")}
    if flags.get("chat"):
        lm.apply_chat_template([{"role": "user", "content": "x"}])  # raises where the tokenizer has no control tokens
    _writable(out)
    rows: list[Row] = []
    if tasks:
        rows += _harness(lm, suite, tasks, flags, base, out)
    if questions:
        rows += _mt_bench(engine, questions, judge, flags, base, source, out)
    for what, count in lm.cut.items():
        if count:
            print(f"note: {count} {what} (context {engine.config.context})", file=sys.stderr)
    print(table(rows))
    print(f"{source.name}: {len(rows)} rows in {out / 'evals.jsonl'}, items in {out / 'items'}")
    return rows


def _names(flags: Mapping[str, Any]) -> tuple[list[str] | None, bool]:
    """Benchmarks of the suite that were asked for (None: all), and whether MT-Bench was, or came with all."""
    suite, tasks = flags["suite"], flags.get("tasks")
    if suite.startswith(f"{LM_EVAL}:"):
        if tasks:
            raise UserError(f"--tasks {tasks}: {LM_EVAL} tasks are named in --suite {LM_EVAL}:TASK,TASK")
        return _split(suite.partition(":")[2], f"--suite {suite}"), False
    if suite not in suites.SUITES:
        raise UserError(f"unknown suite {suite!r}{nearest(suite, [*suites.SUITES, f'{LM_EVAL}:TASK'])}")
    if tasks is None:
        return None, "data_dir" in flags and (Path(flags["data_dir"]) / MT_BENCH).is_dir()
    names, valid = _split(tasks, f"--tasks {tasks}"), [*suites.load(suite).BENCHMARKS, MT_BENCH]
    for name in names:
        if name not in valid:
            raise UserError(f"unknown benchmark {name!r} of {suite}{nearest(name, valid)}")
    return [n for n in names if n != MT_BENCH], MT_BENCH in names


def _split(text: str, where: str) -> list[str]:
    names = [n.strip() for n in text.split(",")]
    if not all(names):
        raise UserError(f"{where} has an empty name; write names with commas between them")
    return list(dict.fromkeys(names))


def _questions(flags: Mapping[str, Any]) -> list[Row]:
    if "data_dir" not in flags:
        raise UserError("mt_bench needs --data_dir, a folder with mt_bench/test.jsonl (FastChat's 80 questions)")
    found = mt_bench.questions(flags["data_dir"])
    if "judge" in flags:
        mt_bench.judge_prompts(flags["data_dir"])
    return found


def _build(flags: Mapping[str, Any], names: Sequence[str] | None) -> tuple[Any, Mapping[str, Any]]:
    """(suite, its tasks)."""
    if flags["suite"].startswith(f"{LM_EVAL}:"):
        return _stock(names or ())
    suite, data = suites.load(flags["suite"]), flags.get("data_dir")
    tasks = suite.build(names, flags["scoring"], data and Path(data), bool(flags.get("allow_code_execution")))
    return suite, tasks


def _harness(lm: Any, suite: Any, tasks: Any, flags: Mapping[str, Any], base: Row, out: Path) -> list[Row]:
    from lm_eval.evaluator import evaluate

    options = dict(log_samples=True, bootstrap_iters=0, limit=flags.get("limit"))
    if flags.get("chat"):
        options |= dict(apply_chat_template=True, fewshot_as_multiturn=True)
    results = evaluate(lm, tasks, **options)
    rows = [base | row for row in suite.summarise(results, tasks)]
    by_task: dict[str, list[Row]] = {}
    for item in suite.items(results, tasks):
        by_task.setdefault(item["task"], []).append(item)
    for task, found in by_task.items():
        _write_items(out, suite.NAME, task, found, lm.readable)
    write_rows(out / "evals.jsonl", rows)
    return rows


def _mt_bench(
    engine: Any, questions: list[Row], judge: Any, flags: Mapping[str, Any], base: Row, source: Source, out: Path
) -> list[Row]:
    asked, folder = questions[: flags.get("limit")], flags["data_dir"]
    replies = mt_bench.answer(engine, asked, out, source.identity, seed=flags["seed"], progress=_progress)
    if cut := sum(r["cut"] for r in replies):
        print(f"note: {cut} MT-Bench prompts were longer than the context and lost their beginning", file=sys.stderr)
    if judge is None:
        print(
            f"MT-Bench: {len(replies)} replies in {out / mt_bench.REPLIES}; no score without a judge "
            "(--judge URL --judge_model NAME)"
        )
        return []
    name = flags["judge_model"]
    graded = mt_bench.grade(replies, asked, mt_bench.judge_prompts(folder), judge, name, out, _progress)
    if lost := sum(g["rating"] is None for g in graded):
        print(f"note: {lost} of {len(graded)} judgements by {name} hold no rating and are left out", file=sys.stderr)
    suite = flags["suite"]
    rows = [base | {"suite": suite, "chat": True} | row for row in mt_bench.rows_of(graded, len(questions))]
    if not rows:
        raise UserError(f"no judgement by {name} holds a rating [[1]] to [[10]]; see {out / mt_bench.JUDGEMENTS}")
    _write_items(out, suite, MT_BENCH, graded, str)
    write_rows(out / "evals.jsonl", rows)
    return rows


def _quiet() -> None:
    """lm-eval's own bars and log lines stay off; its warnings repeat what the table says."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _progress(done: int, total: int, what: str) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r\x1b[2K{what}: {done} of {total}", end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------- the model


def locate(text: str) -> Source:
    """What `--model` means.

    Raises:
      UserError: nothing usable there.
    """
    if text.startswith("hf:"):
        folder = Path(text[3:])
        loading.folder_config(folder)
        files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        forms = [(p.name, s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]
        name = folder.resolve().name
        axes = {"step": 0, "tokens": None}
        return Source(text, text, axes, f"{text} {_digest(forms)}", Path("runs") / "evals" / name)
    if (Path(text) / quantized.RECORD).exists():
        record = huggingface.read_json(Path(text) / quantized.RECORD)
        name = f"{text} {record.get('format')}"
        return Source(text, name, {"step": 0, "tokens": None}, f"{name} {_digest(record)}", Path(text))
    folder, step = loading.find_run(Path(text))
    found = streaming.Reader(folder / "checkpoints", "params.", step).path
    step, record = int(found.name), (found / checkpoint.RECORD).read_bytes()
    written = metrics.read_rows(folder / "metrics.jsonl")
    axes = {"step": step, "tokens": None}
    for row in (*metrics.read_rows(folder / "evals.jsonl"), *written):
        if row["step"] == step:
            axes |= {k: row[k] for k in ("tokens", "flops", "budget") if row.get(k) is not None}
    config = huggingface.read_json(folder / "config.json").get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    last = max((row["step"] for row in written), default=0)
    unfinished = f"{folder} is at step {last} of {steps}" if isinstance(steps, int) and last < steps else None
    identity = f"{folder.resolve().name} step {step} {_digest(record.decode('utf-8', 'replace'))}"
    return Source(str(found), f"{folder} step {step}", axes, identity, folder, unfinished)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------- files


def _writable(out: Path) -> None:
    """Says before hours of work, and not after, that results cannot be written."""
    probe = out / f".probe-{os.getpid()}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror}; choose another --out") from error


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to an evals.jsonl, in place of those of the same step, suite, task and metric; all of it or nothing.

    Other lines stay byte for byte as they are.

    Raises:
      UserError: a disk that is full or not writable; the file then is as it was.
    """
    rows = [metrics.valid_json(row) for row in rows]
    key = ("step", "suite", "task", "metric")
    new = {tuple(row.get(k) for k in key) for row in rows}
    kept = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            old = json.loads(line)
            double = tuple(old.get(k) for k in key) in new
        except (ValueError, AttributeError, TypeError):
            double = False
        kept += [] if double else [line]
    _replace(path, [*kept, *(json.dumps(row, allow_nan=False).encode() for row in rows)])


def _write_items(out: Path, suite: str, task: str, items: Iterable[Row], readable: Any) -> None:
    text = (json.dumps(_plain(item, readable), ensure_ascii=False).encode("utf-8", "replace") for item in items)
    name = f"{suite}-{task}".replace("/", "-").replace(":", "-")
    _replace(out / "items" / f"{name}.jsonl", list(text))


def _plain(value: Any, readable: Any) -> Any:
    """A value as JSON has them: no NaN, no odd types; markers of conversations as text."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, readable) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v, readable) for v in value]
    value = metrics.plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _replace(path: Path, lines: Sequence[bytes]) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(fresh, "wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space, or choose another --out") from error


# ---------------------------------------------------------------------------------------------------- the table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as text: task, scoring, n (subset of N), score, 95% interval, chance; subsets of a benchmark are left out."""
    lines = [("task", "scoring", "n", "score", "95% interval", "chance")]
    for row in rows:
        parts = row["task"].split("/")
        scoring = row.get("scoring") or (parts[1] if parts[1:] and parts[1] in SCORINGS else "generate")
        if len(parts) > 1 + (parts[1:2] == [scoring]) and parts[0] != MT_BENCH:
            continue
        n = f"{row['n']} (subset of {row['subset_of']})" if row.get("subset_of") else str(row["n"])
        known = row.get("low") is not None and math.isfinite(row["low"])
        interval = f"{_number(row['low'], row)} to {_number(row['high'], row)}" if known else "-"
        chance = "-" if row.get("chance") is None else _number(row["chance"], row)
        name = row["task"] if parts[0] == MT_BENCH else parts[0]
        lines.append((name, f"{scoring} {row['metric']}", n, _number(row["value"], row), interval, chance))
    if len(lines) == 1:
        return "no score"
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def _number(value: float, row: Mapping[str, Any]) -> str:
    """Shares in percent, anything else as it is."""
    high = row.get("high")
    share = row.get("scoring") not in ("judge", "other") and 0 <= row["value"] <= 1 and (high is None or high <= 1.01)
    return f"{100 * value:.1f}%" if share else f"{value:.3g}"


# ---------------------------------------------------------------------------------------------------- lm-eval's own


def _stock(names: Sequence[str]) -> tuple[Any, Mapping[str, Any]]:
    """Tasks of lm-eval by name, behind the interface of a suite."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    for name in names:
        if name not in manager.task_index:
            near = [n for n in manager.all_tasks if n.split("_")[0] == name.split("_")[0]] or manager.all_tasks
            raise UserError(f"lm-eval has no task {name!r}{_near(name, near)}")
    try:
        tasks = manager.load(list(names))
    except Exception as error:  # datasets, jinja and file systems each raise their own
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"lm-eval cannot load {', '.join(names)}: {first}; its data come from the Hugging Face Hub"
        ) from error
    if unsafe := [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]:
        raise UserError(
            f"{', '.join(unsafe)} of lm-eval would run model-written code without a sandbox; use --suite phi3_report "
            "--tasks humaneval,mbpp --allow_code_execution"
        )
    return SimpleNamespace(NAME=LM_EVAL, summarise=stock_rows, items=stock_items), tasks


def _near(name: str, valid: Sequence[str]) -> str:
    """`nearest` without the list of thousands."""
    return nearest(name, valid).partition("; valid:")[0].partition(" valid:")[0].rstrip(";") or "; see lm-eval ls tasks"


def stock_rows(results: Mapping[str, Any], tasks: Any) -> list[Row]:
    """One row a task, filter and metric; intervals (Wilson for 0/1, else normal) where a metric is a mean over items."""
    rows = []
    for task, scores in results["results"].items():
        samples = results.get("samples", {}).get(task, [])
        count = results.get("n-samples", {}).get(task, {})
        for name, value in scores.items():
            metric, _, chosen = name.partition(",")
            if not chosen or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own = [s[metric] for s in samples if s.get("filter") == chosen and metric in s]
            row = {"suite": LM_EVAL, "task": task, "metric": metric if chosen == "none" else f"{metric},{chosen}"}
            row |= {"value": float(value), "n": int(count.get("effective") or len(own)), "chance": None}
            row |= {
                "stderr": None,
                "low": None,
                "high": None,
                "scoring": "lm-eval",
                "shots": results["n-shot"].get(task),
            }
            total = count.get("original")
            row["subset_of"] = total if total and total > row["n"] else None
            numeric = bool(own) and all(isinstance(v, (bool, int, float)) for v in own)
            if numeric and math.isclose(sum(own) / len(own), value, rel_tol=1e-6, abs_tol=1e-9):
                share = set(map(float, own)) <= {0.0, 1.0}
                found = statistics.proportion(own) if share else statistics.clustered_mean(own, range(len(own)))
                row |= {"stderr": found.stderr, "low": found.low, "high": found.high}
            else:
                row["scoring"] = "other" if not 0 <= value <= 1 else "lm-eval"
            rows.append(row)
    return rows


def stock_items(results: Mapping[str, Any], tasks: Any) -> Iterator[Row]:
    """The samples that lm-eval logged, each with its task."""
    for task, samples in results.get("samples", {}).items():
        for sample in samples:
            yield {"task": task, **sample}
