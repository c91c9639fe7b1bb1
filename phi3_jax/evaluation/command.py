"""The command `launch/evaluate.py`: a model, a suite, a table, and rows in evals.jsonl."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import phi3_jax
from phi3_jax.errors import UserError, nearest
from phi3_jax.evaluation import clean, judge, mt_bench, stock, suites
from phi3_jax.evaluation.kept import RESUME, Kept
from phi3_jax.inference.endpoint import Endpoint
from phi3_jax.interop import loading, quantized
from phi3_jax.records import checkpoint, files, ownership, scorer, streaming
from phi3_jax.records.rows import add_rows, encoded, plain, read_rows
from phi3_jax.training.progress import Bar, Bars

SCORINGS = ("both", "letter", "harness")
LM_EVAL = stock.NAME
LONG_CONTEXT, SAFETY, REDTEAM, PICTURES = "longcontext", "safety", "safety:redteam", "phi3_vision_report"
# Suites that need no lm-eval, each a module with `asked(flags)` and `Suite(model, asked)` (pictures: `named`, `results`).
OWN = {
    LONG_CONTEXT: "phi3_jax.evaluation.long_context",
    SAFETY: "phi3_jax.evaluation.safety",
    REDTEAM: "phi3_jax.evaluation.redteam",
    "calibration": "phi3_jax.evaluation.calibration",
    PICTURES: "phi3_jax.evaluation.vision_report",
}
ONE_DEVICE = (LONG_CONTEXT, REDTEAM, PICTURES)  # suites that have no copies of the model
LEAST = 4096  # tokens: below, lm-eval's generators of RULER's items loop or give empty answers
MT_BENCH = "mt_bench"
ANOTHER = mt_bench.ANOTHER

Row = dict[str, Any]
Progress = Callable[[int, int, str], None]


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


def command(flags: Mapping[str, Any]) -> None:
    """The command."""
    if (flags["judge"] is None) != (flags["judge_model"] is None):
        lost = "judge_model" if flags["judge"] else "judge"
        raise UserError(f"--{lost} missing; a judge is a server and one of its models: --judge URL --judge_model NAME")
    if flags.get("clean"):
        clean.contaminated(str(flags.get("clean")))  # what is wrong with it is said before the model is loaded
    if _samples(flags) and flags["limit"]:
        raise UserError("--samples names the items, so that --limit has nothing to do; leave one out")
    if flags["system"] and not flags["chat"] and flags["suite"] not in (SAFETY, REDTEAM):
        raise UserError("--system is a turn of a chat; add --chat")
    if flags["devices"] > 1 and flags["suite"] in ONE_DEVICE:
        raise UserError(f"--devices {flags['devices']}: --suite {flags['suite']} runs on one device; leave it out")
    long = flags["suite"] == LONG_CONTEXT  # which reads text, of a file too
    stocked = flags["suite"].startswith(f"{LM_EVAL}:")
    if not long and (flags["depths"] or (flags["lengths"] and not stocked)):
        raise UserError(f"--lengths and --depths are of --suite {LONG_CONTEXT}; leave them out")
    if not long and flags["data_dir"] and not Path(flags["data_dir"]).is_dir():
        raise UserError(f"--data_dir {flags['data_dir']} is no folder; give one that holds <benchmark>/test.jsonl")
    run(flags)


# ---------------------------------------------------------------------------------------------------- the run


def run(flags: Mapping[str, Any]) -> list[Row]:
    """Evaluates, writes and prints; the rows. Everything a user can get wrong is checked before the model is loaded."""
    if flags["suite"] in OWN:
        return _own(flags)
    rater = Endpoint(flags["judge"], flags["judge_model"]) if flags["judge"] else None
    names, with_mt_bench = _names(flags)
    questions = _questions(flags) if with_mt_bench else []
    if rater is not None and not questions:
        raise UserError("--judge rates MT-Bench only; add --tasks mt_bench (and --data_dir), or leave it out")
    source = locate(flags["model"], flags["adapter"])
    out = Path(flags["out"] or source.out)
    if source.unfinished and out.resolve() == source.out.resolve():
        raise UserError(f"{source.unfinished}, and evals.jsonl there is its trainer's; give --out DIR")
    _quiet()
    stock.offline_at_once(flags["data_dir"] is not None)
    from phi3_jax.evaluation import harness  # says how to install lm-eval where it is not

    _gen_kwargs(flags)
    suite, tasks = _build(flags, names, source) if names != [] else (None, {})
    _known(flags, tasks)
    if not tasks and not questions:
        raise UserError(f"no benchmark of {flags['suite']} can run with these flags; give --data_dir or name --tasks")
    from phi3_jax.evaluation import batches
    from phi3_jax.evaluation.copies import engine_of

    devices = flags["devices"]
    auto = flags["batch"] == "auto"
    batch = batches.at_once(loading.config_of(source.path), LEAST) if auto else flags["batch"]
    engine = engine_of(loading.load(source.path, adapter=flags["adapter"]), batch, devices)
    kept = Kept(Path(flags["use_cache"] or out / RESUME), f"{source.identity} {phi3_jax.__version__} {engine.dtype}")
    fit = batches.fit(engine.config, engine.dtype) if auto else None
    lm = harness.HarnessLM(engine, batch * devices, seed=flags["seed"], kept=kept, fit=fit)
    base = {**source.axes, "model": source.name, "chat": flags["chat"], "limit": flags["limit"]}
    base["scorer"] = scorer.VERSION
    if flags["chat"]:
        lm.apply_chat_template([{"role": "user", "content": "x"}])  # raises where the tokenizer has no control tokens
        print(f"note: chat template {engine.template.name}, {engine.template.why}", file=sys.stderr)
    _writable(out)
    rows: list[Row] = []
    with _progress() as progress:
        if tasks:
            lm.progress = progress
            rows += _harness(lm, suite, tasks, flags, base, out)
            if not flags["use_cache"]:
                kept.finish()
        if questions:
            rows += _mt_bench(engine, questions, rater, flags, base, source, out, progress)
    if kept.taken:
        print(f"note: {kept.taken} answers are those of an earlier start", file=sys.stderr)
    for what, count in lm.cut.items():
        if count:
            print(f"note: {count} {what} (context {engine.config.context})", file=sys.stderr)
    print(table(rows))
    print(f"{source.name}: {len(rows)} rows in {out / 'evals.jsonl'}, items in {out / 'items'}")
    return rows


def _own(flags: Mapping[str, Any]) -> list[Row]:
    """A suite of our own, which needs no lm-eval."""
    name = flags["suite"]
    module = importlib.import_module(OWN[name])
    source = locate(flags["model"], flags["adapter"])
    out = Path(flags["out"] or source.out)
    if source.unfinished and out.resolve() == source.out.resolve():
        raise UserError(f"{source.unfinished}, and evals.jsonl there is its trainer's; give --out DIR")
    if flags["batch"] == "auto":
        from phi3_jax.evaluation import batches

        cfg = loading.config_of(source.path)
        flags = {**flags, "batch": batches.at_once(cfg, cfg.context if name == LONG_CONTEXT else LEAST)}
    asked = (module.named if name == PICTURES else module.asked)(flags)  # says what is wrong before the model is loaded
    model = loading.load(source.path, adapter=flags["adapter"])
    if name == PICTURES:
        return _written(source, out, flags, True, lambda progress: module.results(model, flags, progress))
    kept = Kept(Path(flags["use_cache"] or out / RESUME), f"{source.identity} {phi3_jax.__version__} {model.dtype}")
    more = {LONG_CONTEXT: (), REDTEAM: (kept, out)}
    suite = module.Suite(model, asked, *more.get(name, (kept,)))
    rows = _written(source, out, flags, flags["chat"], suite.results)
    if not flags["use_cache"]:
        kept.finish()
    if kept.taken:
        print(f"note: {kept.taken} answers are those of an earlier start", file=sys.stderr)
    return rows


def _written(
    source: Source,
    out: Path,
    flags: Mapping[str, Any],
    chat: bool,
    results: Callable[[Progress], Iterable[tuple[str, list[Row], list[Row]]]],
) -> list[Row]:
    """Writes the rows and items of a suite of our own, task by task, and prints the table; the rows."""
    name = flags["suite"]
    _writable(out)
    base = {**source.axes, "model": source.name, "chat": chat, "limit": flags["limit"], "suite": name}
    base["scorer"] = scorer.VERSION
    rows: list[Row] = []
    with _progress() as progress:
        for task, new, items in results(progress):
            rows += (new := [base | row for row in new])
            write_rows(out / "evals.jsonl", new)
            if items:
                _write_items(out, name, task, items, str)
    print(table(rows))
    print(f"{source.name}: {len(rows)} rows in {out / 'evals.jsonl'}, items in {out / 'items'}")
    return rows


def _names(flags: Mapping[str, Any]) -> tuple[list[str] | None, bool]:
    """Benchmarks of the suite that were asked for (None: all), and whether MT-Bench was, or came with all."""
    suite, tasks = flags["suite"], flags["tasks"]
    if suite.startswith(f"{LM_EVAL}:"):
        if tasks:
            raise UserError(f"--tasks {tasks}: {LM_EVAL} tasks are named in --suite {LM_EVAL}:TASK,TASK")
        return _split(suite.partition(":")[2], f"--suite {suite}"), False
    if suite not in suites.SUITES:
        raise UserError(f"unknown suite {suite!r}{nearest(suite, [*suites.SUITES, *OWN, f'{LM_EVAL}:TASK'])}")
    if tasks is None:
        return None, flags["data_dir"] is not None and (Path(flags["data_dir"]) / MT_BENCH).is_dir()
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
    if not flags["data_dir"]:
        raise UserError("mt_bench needs --data_dir, a folder with mt_bench/test.jsonl (FastChat's 80 questions)")
    found = mt_bench.questions(flags["data_dir"])
    if flags["judge"]:
        mt_bench.judge_prompts(flags["data_dir"])
    return found


def _build(flags: Mapping[str, Any], names: Sequence[str] | None, source: Source) -> tuple[Any, Mapping[str, Any]]:
    """(suite, its tasks)."""
    if flags["suite"].startswith(f"{LM_EVAL}:"):
        return stock.build(names or (), flags["data_dir"] and Path(flags["data_dir"]), _metadata(flags, source))
    suite, data = suites.load(flags["suite"]), flags["data_dir"]
    tasks = suite.build(names, flags["scoring"], data and Path(data), flags["allow_code_execution"])
    return suite, tasks


def _known(flags: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Refuses --samples of tasks that are not asked."""
    valid = tasks.get("tasks", tasks)
    for name in _samples(flags) or ():
        if name not in valid:
            raise UserError(f"--samples names {name!r}, which is not asked{nearest(name, valid)}")


def _metadata(flags: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """What lm-eval's tasks that make their own items (RULER's) need: the tokenizer's folder, and lengths."""
    from phi3_jax.evaluation.long_context import length_of

    found: dict[str, Any] = {}
    folder = loading.kept_folder(source.path)
    if (folder / "tokenizer.json").is_file():
        found["tokenizer"] = str(folder)
    if flags["lengths"]:
        found["max_seq_lengths"] = sorted({length_of(text) for text in flags["lengths"].split(",")})
        if found["max_seq_lengths"][0] < LEAST:
            raise UserError(
                f"--lengths {flags['lengths']}: lm-eval's items are right from {LEAST:,} tokens on; shorter ones are those "
                f"of --suite {LONG_CONTEXT}"
            )
        if "tokenizer" not in found:
            raise UserError(
                f"{source.path} has no tokenizer.json, by which lm-eval measures; take --suite {LONG_CONTEXT}"
            )
    return found


def _harness(lm: Any, suite: Any, tasks: Any, flags: Mapping[str, Any], base: Row, out: Path) -> list[Row]:
    from lm_eval.evaluator import evaluate

    options = dict(log_samples=True, bootstrap_iters=0, limit=flags["limit"], samples=_samples(flags))
    options["system_instruction"] = flags["system"]
    if flags["chat"]:
        options |= dict(apply_chat_template=True, fewshot_as_multiturn=True)
    stock.told(tasks, _gen_kwargs(flags))
    results = evaluate(lm, tasks, **options)
    stock.readable_samples(results, lm.readable)
    rows = [base | row for row in suite.summarise(results, tasks)]
    items = list(suite.items(results, tasks))
    if flags.get("clean"):
        rows += clean.rows(rows, items, clean.contaminated(str(flags.get("clean"))))
    by_task: dict[str, list[Row]] = {}
    for item in items:
        by_task.setdefault(item["task"], []).append(item)
    for task, found in by_task.items():
        _write_items(out, suite.NAME, task, found, lm.readable)
    if suite.NAME == LM_EVAL:
        config = {"model": "phi3_jax", "model_args": {"path": base["model"]}, "batch_size": flags["batch"]}
        config |= {"limit": flags["limit"], "gen_kwargs": _gen_kwargs(flags) or None, "use_cache": flags["use_cache"]}
        config |= dict(zip((f"{x}_seed" for x in ("random", "numpy", "torch", "fewshot")), stock.SEEDS, strict=True))
        template = lm.chat_template(True) if flags["chat"] else None
        about = {"config": config, "model": base["model"], "system": flags["system"], "template": template}
        with _said(out / stock.RESULTS):
            stock.write_results(out, results, about)
    write_rows(out / "evals.jsonl", rows)
    return rows


def _gen_kwargs(flags: Mapping[str, Any]) -> dict[str, Any]:
    """What --gen_kwargs says, as NAME=VALUE,NAME=VALUE or as a JSON object."""
    from lm_eval.utils import simple_parse_args_string

    from phi3_jax.evaluation.harness import generation_settings

    text = (flags["gen_kwargs"] or "").strip()
    found = files.parse_json(text, "--gen_kwargs") if text.startswith("{") else simple_parse_args_string(text)
    generation_settings(found)  # raises UserError for what no decoder has
    return dict(found)


def _samples(flags: Mapping[str, Any]) -> dict[str, list[int]] | None:
    """What --samples says: numbers of items by task."""
    if not flags["samples"]:
        return None
    found = files.parse_json(flags["samples"], "--samples")
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(n, list) and n and all(type(i) is int and i >= 0 for i in n) for n in numbers):
        raise UserError("""--samples must be a JSON object of item numbers by task, such as '{"boolq": [0, 3]}'""")
    return dict(found)


def _mt_bench(
    engine: Any,
    questions: list[Row],
    rater: judge.Ask | None,
    flags: Mapping[str, Any],
    base: Row,
    source: Source,
    out: Path,
    progress: Progress,
) -> list[Row]:
    asked, folder = questions[: flags["limit"]], flags["data_dir"]
    replies = mt_bench.answer(engine, asked, out, source.identity, seed=flags["seed"], progress=progress)
    if cut := sum(r["cut"] for r in replies):
        print(f"note: {cut} MT-Bench prompts were longer than the context and lost their beginning", file=sys.stderr)
    if rater is None:
        print(
            f"MT-Bench: {len(replies)} replies in {out / mt_bench.REPLIES}; no score without a judge "
            "(--judge URL --judge_model NAME)"
        )
        return []
    name = flags["judge_model"]
    graded = mt_bench.grade(replies, asked, mt_bench.judge_prompts(folder), rater, name, out, progress)
    lost = sum(g["rating"] is None for g in graded)
    if lost:
        print(f"note: {lost} of {len(graded)} judgements by {name} hold no rating and are left out", file=sys.stderr)
    suite = flags["suite"]
    rows = [base | {"suite": suite, "chat": True} | row for row in mt_bench.rows_of(graded, len(questions))]
    if not rows:
        raise UserError(f"no judgement by {name} holds a rating [[1]] to [[10]]; see {out / mt_bench.JUDGEMENTS}")
    judge.require(name, lost, len(graded))
    _write_items(out, suite, MT_BENCH, graded, str)
    write_rows(out / "evals.jsonl", rows)
    return rows


def _quiet() -> None:
    """lm-eval's own bars and log lines stay off; its warnings repeat what the table says."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Says on a terminal how far each part of the work is."""
    if not sys.stderr.isatty():
        yield lambda *_: None
        return
    with Bars(sys.stderr) as bars:
        yield lambda done, total, what: bars.show({what: Bar(done, total, f"{done} of {total}")})


# ---------------------------------------------------------------------------------------------------- the model


def locate(text: str, adapter: str | None = None) -> Source:
    """What `--model` means, with an adapter beside it what that does: results are the adapter's.

    Raises:
      UserError: nothing usable there.
    """
    if adapter:
        under, beside = locate(text), locate(adapter)
        identity = f"{under.identity} {beside.identity}"
        return dataclasses.replace(beside, path=under.path, name=f"{beside.name} on {under.name}", identity=identity)
    if text.startswith("hf:"):
        folder = Path(text[3:])
        loading.folder_config(folder)
        paths = sorted([folder / "config.json", *folder.glob("*.safetensors")])
        forms = [(p.name, s.st_size, s.st_mtime_ns) for p in paths for s in [p.stat()]]
        name = folder.resolve().name
        identity = f"{text} {_digest(forms)}"
        return Source(text, text, {"step": 0, "tokens": None}, identity, Path("runs") / "evals" / name)
    if (Path(text) / quantized.RECORD).exists():
        record = files.read_json(Path(text) / quantized.RECORD)
        name = f"{text} {record.get('format')}"
        return Source(text, name, {"step": 0, "tokens": None}, f"{name} {_digest(record)}", Path(text))
    folder, step = loading.find_run(Path(text))
    found = streaming.Reader(folder / "checkpoints", "params.", step).path
    step, saved = int(found.name), (found / checkpoint.RECORD).read_bytes()
    written = read_rows(folder / "metrics.jsonl")
    axes: dict[str, Any] = {"step": step, "tokens": None}
    for row in (*read_rows(folder / "evals.jsonl"), *written):
        if row["step"] == step:
            axes |= {k: row[k] for k in ("tokens", "flops", "budget") if row.get(k) is not None}
    config = files.read_json(folder / "config.json").get("config")
    steps = config.get("steps") if isinstance(config, dict) else None
    last = max((row["step"] for row in written), default=0)
    unfinished = f"{folder} is at step {last} of {steps}" if isinstance(steps, int) and last < steps else None
    identity = f"{folder.resolve().name} step {step} {_digest(saved.decode('utf-8', 'replace'))}"
    return Source(str(found), f"{folder} step {step}", axes, identity, folder, unfinished)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


# ---------------------------------------------------------------------------------------------------- files


def _writable(out: Path) -> None:
    """Says before hours of work, and not after, that results cannot be written."""
    with ownership.own(out, ANOTHER, inside=True, wait=True), _said(out):
        files.sweep(out / "evals.jsonl")


def write_rows(path: Path, new: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to an evals.jsonl, in place of those of the same step, suite, task, metric and model; all or nothing.

    Waits while another process, a trainer or an evaluation, writes to the folder.

    Raises:
      UserError: a disk that is full or not writable; the file then is as it was.
    """
    add_rows(path, new, ANOTHER)


def _write_items(out: Path, suite: str, task: str, items: Iterable[Row], readable: Any) -> None:
    name = f"{suite}-{task}".replace("/", "-").replace(":", "-")
    path = out / "items" / f"{name}.jsonl"
    with _said(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, b"".join(encoded(_plain(item, readable)) for item in items), durable=True)


def _plain(value: Any, readable: Any) -> Any:
    """A value as JSON has them: no NaN, no odd types; markers of conversations as text."""
    if isinstance(value, str):
        return readable(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, readable) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(v, readable) for v in value]
    value = plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turns what hinders writing a file into a line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free some space, or {ANOTHER}") from error


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
