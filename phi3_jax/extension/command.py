"""The command `launch/extend.py`: a longer window for a trained model, by a search of its RoPE factors.

A folder holds factors.json (Hugging Face's form, and what the search saw), the run with the new window, and in search/ all
values so far, one line each: a search that was killed goes on with them, and ends as it would have.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax.configs import LongRope, ModelConfig, config_diff, shown_changes
from phi3_jax.data import long_rows as made_of
from phi3_jax.data import needles, sources
from phi3_jax.data.long_rows import Rows
from phi3_jax.errors import UserError
from phi3_jax.extension import lists, search, training
from phi3_jax.extension.asked import Asked, asked, identity
from phi3_jax.inference.forward import Judge
from phi3_jax.interop import huggingface, loading
from phi3_jax.interop.content import content
from phi3_jax.models.spec import count_params, param_specs
from phi3_jax.records import files, ownership, rows, streaming
from phi3_jax.records.folder import KEPT
from phi3_jax.sharding import rules
from phi3_jax.sharding.mesh import make_mesh

NEEDLES, TEXTS = 32, 8  # rows of a fitness; with 8 of needles a search improves its own rows alone
# Rows that the search does not see: of text so many tokens, 16 to 64 rows; questions for needles, 1.5 for each, 48 or more.
EVAL_TOKENS, EVAL_TEXTS, QUESTIONS = 2**16, (16, 64), 48
EVAL_SEED = 0  # the same rows for every search, so that two can be compared
LARGE = 1e9  # parameters from which they are split over devices
FACTORS, SEARCH, JOURNAL, RECORD = "factors.json", "search", "values.jsonl", "search.json"


def command(flags: Mapping[str, Any]) -> int:
    """The command."""
    found = asked(flags)
    out = Path(flags["out"])
    _refuse_foreign(out)
    fitness, evaluation, notes = _rows(found)
    print(*_said(found, notes), sep="\n", flush=True)
    known = identity(found, {name: one.digest for name, one in fitness.items()}, content(found.weights))
    with ownership.own(out, "choose another --out", inside=True):
        _claim(out, known)
        judge = _judge(found)
        result = extend(found, judge, fitness, evaluation, out)
        files.write_json(out / FACTORS, result, durable=True)
        print(*table(result), sep="\n", flush=True)
        cfg = extended(found, result)
        write_run(found.weights, cfg, out / SEARCH / "model" if flags["train"] else out)
        status = train(found, out, cfg, judge, evaluation, result) if flags["train"] else 0
        if not status:
            from phi3_jax.extension import page  # matplotlib only here

            page.write(out, result, found.weights.config.label)
    print(f"{cfg.name}: {out}, {out / FACTORS}" + ("" if status else f", {out / 'extension.html'}"))
    return status


# ------------------------------------------------------------------------------------------------ what is there


def _refuse_foreign(out: Path) -> None:
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / SEARCH / RECORD).is_file())):
        others = [path for path in out.iterdir() if path.name != ownership.INSIDE] if out.is_dir() else [out]
        if others:
            raise UserError(f"{out} exists and holds no extension; choose another --out, or remove it")


def _claim(out: Path, known: Mapping[str, Any]) -> None:
    """Writes down what is searched for; refuses a folder that holds another search."""
    old = files.read_state(out / SEARCH / RECORD)
    if old and (changes := config_diff(old, known)):
        raise UserError(
            f"{out} holds another extension ({shown_changes(changes)}); choose another --out, or put that back"
        )
    if not old:
        (out / SEARCH).mkdir(exist_ok=True)
        files.write_json(out / SEARCH / RECORD, known, durable=True)


def _rows(found: Asked) -> tuple[dict[str, Rows], dict[str, Rows], list[str]]:
    """Rows of the fitness and of the evaluation, by what they hold, and lines about them."""
    flags, texts = found.flags, sources.texts(found.data, found.flags["text_field"], True)
    pieces = made_of.pieces(texts.documents, found.tokenizer, found.target + 1)
    form, seed, fitness = needles.Form(found.tokenizer), flags["seed"], flags["fitness"]
    judged, unseen = {}, {}
    if fitness != "needle":
        judged["text"] = made_of.text_rows(pieces, "search", TEXTS, found.task.original, seed)
    if fitness != "text":
        judged["needle"] = made_of.needle_rows(pieces, "search", NEEDLES, form, seed)
    texts_there = int(np.clip(EVAL_TOKENS // found.target, *EVAL_TEXTS))
    unseen["text"] = made_of.text_rows(pieces, "evaluation", texts_there, 0, EVAL_SEED)
    length = found.task.original
    while fitness != "text" or _even(form):
        length = min(length, found.target)
        if length > 4 * form.longest:
            questions = max(QUESTIONS, 3 * texts_there // 2)
            unseen[str(length)] = made_of.needle_rows(pieces, "evaluation", questions, form, EVAL_SEED, length)
        if length == found.target:
            break
        length *= 2
    sides = ", ".join(f"{len(pieces.sides[side])} for {side}" for side in made_of.SIDES)
    notes = [f"data: {pieces.documents:,} documents, the longest of {pieces.longest:,} tokens; rows {sides}"]
    if missing := [side for side in made_of.SIDES[:2] if not pieces.sides[side]]:
        notes.append(f"note: no held-out document is long enough for {' or '.join(missing)}: training's are taken")
    return judged, unseen, notes


def _even(form: needles.Form) -> bool:
    try:
        return form.value > 0
    except UserError:
        return False


def _said(found: Asked, notes: Sequence[str]) -> list[str]:
    """What will be done, with every default."""
    task, flags, cfg = found.task, found.flags, found.weights.config
    factor = attention_factor(found)
    name = f"{cfg.label} from L0 = {task.original:,} to {found.target:,} tokens: s = {task.scale:g}"
    lines = [
        name, f"attention factor {factor:.6g}, {_why(found)}",
        f"method {found.method}" + (
            f", fitness {flags['fitness']}, {flags['evaluations']:,} evaluations, critical pair at most "
            f"{lists.critical(task)} of {task.half}" if found.searches else ""
        ) + f", seed {flags['seed']}, train {flags['train']:,} tokens, mix {flags['mix']:g}",
        *notes,
    ]  # fmt: skip
    if cfg.sliding_window is not None:
        lines.append(f"the window of {cfg.window_keys:,} keys is lifted, as in the released 128k models")
    if cfg.blocksparse:
        lines.append(
            f"the list matters most in the {cfg.dense_layers} dense layers of {cfg.layers}: the others see "
            f"{cfg.blocksparse.local_blocks * cfg.blocksparse.block:,} tokens back and every "
            f"{cfg.blocksparse.vert_stride}th block of {cfg.blocksparse.block}"
        )
    return lines


def attention_factor(found: Asked) -> float:
    """Factor on cos and sin that the extended model has: the one that stands beside a given list, or the method's."""
    if found.factor is not None:
        return found.factor
    return lists.attention_factor(found.method if found.method in lists.FORMS else "longrope", found.task)


def _why(found: Asked) -> str:
    if found.factor is not None:
        return f"as {found.flags['factors']} has it"
    if found.method == "yarn":
        return "YaRN's .1 ln s + 1"
    if found.method in lists.FORMS:
        return "as the method has it"
    return f"sqrt(1 + ln s / ln L0), set by the target over --original ({found.task.original:,})"


# ------------------------------------------------------------------------------------------------ the search


def _judge(found: Asked) -> Judge:
    cfg = found.model
    strategy = "fsdp" if count_params(cfg) > LARGE and len(jax.devices()) > 1 else "dp"
    mesh = make_mesh(strategy=strategy)
    shardings = rules.param_shardings(param_specs(cfg), strategy, mesh)
    params = loading.place(cfg, found.weights.dtypes, found.weights.read, shardings)
    half = next(iter(found.weights.dtypes.values())).itemsize == 2 and jax.default_backend() != "cpu"
    return Judge(params, cfg, mesh, strategy, jax.numpy.bfloat16 if half else jax.numpy.float32)


def fitness_of(judge: Judge, rows: Mapping[str, Rows], factors: Sequence[float], scale: float) -> dict[str, float]:
    """{kind of rows: mean nll of what counts in them} and their mean as "fitness", nats."""
    found = {name: float(judge(one, factors, scale)[0].astype(np.float64).mean()) for name, one in rows.items()}
    return found | {"fitness": float(np.mean(list(found.values())))}


def extend(
    found: Asked, judge: Judge, fitness: Mapping[str, Rows], evaluation: Mapping[str, Rows], out: Path
) -> dict[str, Any]:
    """factors.json: the list that was found, all baselines, and what both make of rows that the search did not see."""
    journal, scale, start = out / SEARCH / JOURNAL, attention_factor(found), time.perf_counter()
    kept = {
        tuple(row["factors"]): row for row in rows.read(journal)[0] if row.get("scale") == scale and "fitness" in row
    }

    def evaluate(some: Sequence[search.List]) -> list[float]:
        for one in some:
            if one not in kept:
                kept[one] = {"factors": list(one), "scale": scale, **fitness_of(judge, fitness, one, scale)}
                rows.append(journal, kept[one])
        return [kept[one]["fitness"] for one in some]

    best, curve = _chosen(found, evaluate)
    tried: dict[str, Any] = {}
    task = found.task
    named = {n: (search.as_list(form(task)), lists.attention_factor(n, task)) for n, form in lists.FORMS.items()}
    if not found.searches:  # what a list does is known from the search beside it
        named = {"none": named["none"]}
    for name, (factors, own) in (named | {found.method: (best, scale)}).items():
        tried[name] = {"factors": list(factors), "attention_factor": own, **fitness_of(judge, fitness, factors, own)}
        tried[name]["unseen"] = unseen(judge, evaluation, factors, own, task.original)
    return {
        "type": "longrope", "short_factor": [1.0] * found.task.half, "long_factor": list(best),
        "original_max_position_embeddings": found.task.original, "max_position_embeddings": found.target,
        "attention_factor": scale,
        "made_by": {
            "method": found.method, "L0": found.task.original, "s": found.task.scale, "fitness": found.flags["fitness"],
            "seed": found.flags["seed"], "evaluations": len(kept), "curve": [list(point) for point in curve],
            "rows": {name: one.digest for name, one in fitness.items()}, "lists": tried,
            "seconds": round(time.perf_counter() - start, 1),
        },
    }  # fmt: skip


def _chosen(
    found: Asked, evaluate: Callable[[Sequence[search.List]], list[float]]
) -> tuple[search.List, Sequence[Any]]:
    if found.given is not None:
        return search.as_list(found.given), ()
    if not found.searches:
        return search.as_list(lists.FORMS[found.method](found.task)), ()
    old = found.weights.config.longrope
    start = search.seeds(found.task, old.long if old else None)
    yarn = start["yarn"]

    def tell(generation: int, so_far: search.Found) -> None:
        count, value = so_far.curve[-1]
        line = f"generation {generation}: {count:,} of {found.flags['evaluations']:,} evaluations, best {value:.4f}"
        print(f"{line} (yarn {so_far.values.get(yarn, float('nan')):.4f})", file=sys.stderr, flush=True)

    space = search.Space(found.task, found.method)
    result = search.search(space, start, evaluate, found.flags["evaluations"], found.flags["seed"], tell)
    return result.best, result.curve


def unseen(
    judge: Judge, evaluation: Mapping[str, Rows], factors: Sequence[float], scale: float, original: int
) -> dict[str, Any]:
    """What a list makes of unseen rows: text loss by position; by length the digits, also by depth, and the needle loss.

    `alone` is the loss of the last bin's tokens in windows of the original length, without what stands before them.
    """
    found: dict[str, Any] = {"digits": {}, "by_depth": {}, "needle_nll": {}}
    for name, one in evaluation.items():
        nll, hit = judge(one, factors, scale)
        if name == "text":
            parts = made_of.bins(original, nll.shape[1])
            found["text"] = {f"{a}-{b}": float(nll[:, a:b].mean()) for a, b in parts}
            found["beyond"] = float(nll[:, original:].mean())
            found["alone"] = alone(judge, one, factors, scale, original)
        else:
            found["digits"][name], found["needle_nll"][name] = float(hit.mean()), float(nll.mean())
            found["by_depth"][name] = [float(hit[d :: made_of.DEPTHS].mean()) for d in range(made_of.DEPTHS)]
    return found


def table(result: Mapping[str, Any]) -> list[str]:
    """The lists as lines of text."""
    tried = result["made_by"]["lists"]
    first = next(iter(tried.values()))["unseen"]
    head = ["list", "m", "fitness", "text beyond L0", *first["text"], *(f"digits {n}" for n in first["digits"])]
    lines = [head]
    for name, one in tried.items():
        new = one["unseen"]
        numbers = [one["attention_factor"], one["fitness"], new["beyond"], *new["text"].values()]
        lines.append([name, *(f"{x:.3f}" for x in numbers), *(f"{x:.2f}" for x in new["digits"].values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return [*shown, f"factors: {' '.join(f'{x:g}' for x in result['long_factor'])}"]


# ------------------------------------------------------------------------------------------------ the run


def train(
    found: Asked, out: Path, cfg: ModelConfig, judge: Judge, evaluation: Mapping[str, Rows], result: dict[str, Any]
) -> int:
    """Trains the searched model in `out`, a study of one run, and adds to factors.json what it makes of the unseen rows."""
    from phi3_jax.study.launch import launch

    before = short_loss(judge, evaluation["text"], found.task.original, None, 1.0)
    asked_for = training.study(found, cfg, out / SEARCH / "model", out)
    status = launch(asked_for, training.line(getattr(found.flags, "words", ())))
    if status:
        return status
    trained = loading.open_weights(str(out))
    after = _judge(dataclasses.replace(found, weights=trained))
    factors, scale = result["long_factor"], result["attention_factor"]
    new = unseen(after, evaluation, factors, scale, found.task.original)
    short = short_loss(after, evaluation["text"], found.task.original, result["short_factor"], scale)
    result["made_by"]["trained"] = {
        "tokens": found.flags["train"], "mix": found.flags["mix"], "unseen": new, "short_before": before, "short": short,
    }  # fmt: skip
    files.write_json(out / FACTORS, result, durable=True)
    text = "  ".join(f"{name} {value:.3f}" for name, value in new["text"].items())
    digits = "  ".join(f"{name} {value:.2f}" for name, value in new["digits"].items())
    print(f"after {found.flags['train']:,} tokens: text beyond L0 {new['beyond']:.3f}; {text}; digits {digits}")
    print(f"short inputs: {before:.3f} before, with the short list {short:.3f} now")
    return 0


def short_loss(judge: Judge, text: Rows, original: int, factors: Sequence[float] | None, scale: float) -> float:
    """Mean loss of rows of the original length, under the short list; None: as the model was."""
    length = text.tokens.shape[1]
    ids = np.concatenate([text.tokens, text.targets[:, -1:]], axis=1)
    pieces = ids[:, : (length + 1) // (original + 1) * (original + 1)].reshape(-1, original + 1)
    plain = np.ones(judge.cfg.head_dim // 2)
    return float(judge(made_of.of_ids(pieces, 0), plain if factors is None else factors, scale)[0].mean())


def alone(judge: Judge, text: Rows, factors: Sequence[float], scale: float, original: int) -> float:
    """Mean loss of the last half of rows of text, cut into windows of the original length."""
    length = text.tokens.shape[1]
    ids = np.concatenate([text.tokens, text.targets[:, -1:]], axis=1)
    starts = range(made_of.bins(original, length)[-1][0], length - original + 1, original)
    pieces = np.concatenate([ids[:, start : start + original + 1] for start in starts])
    return float(judge(made_of.of_ids(pieces, 0), factors, scale)[0].mean())


def extended(found: Asked, result: Mapping[str, Any]) -> ModelConfig:
    """The model with the new window."""
    cfg, factor = found.weights.config, result["attention_factor"]
    rope = LongRope(
        found.task.original, tuple(result["short_factor"]), tuple(result["long_factor"]),
        mscale_when_short=cfg.layout != "phi3small",
    )  # fmt: skip
    if abs(lists.attention_factor("longrope", found.task) - factor) > 1e-12:
        rope = dataclasses.replace(rope, long_mscale=factor, short_mscale=factor if rope.mscale_when_short else 1.0)
    size = f"{found.target // 1024}k" if found.target % 1024 == 0 else str(found.target)
    return dataclasses.replace(found.model, name=f"{cfg.name}-{size}", longrope=rope)


def write_run(weights: loading.Weights, cfg: ModelConfig, folder: Path) -> None:
    """Weights as a run of another config of the same shape; config.json, which makes it a run, comes last."""
    leaves = huggingface.leaves_of(cfg)
    forms = {f"params.{leaf}": (spec.shape, weights.dtypes[leaf]) for leaf, spec in leaves.items()}
    if not (folder / "checkpoints" / "0").is_dir():
        with streaming.stream(folder / "checkpoints", 0, forms, {"extended": True}) as put:
            for leaf, spec in leaves.items():
                for layer in spec.layers:
                    put(f"params.{leaf}", layer, weights.part(leaf, layer))
    if weights.kept.is_dir():
        (folder / KEPT).mkdir(exist_ok=True)
        for path in huggingface.kept_files(weights.kept):
            if path.name != "config.json":  # that of the short window
                shutil.copyfile(path, folder / KEPT / path.name)
    made = files.read_state(weights.run / "config.json").get("tokenizer") if weights.run else None
    record = {"name": cfg.name, "label": cfg.label, "config": {"model": dataclasses.asdict(cfg)}}
    files.write_json(folder / "config.json", record | ({"tokenizer": made} if made else {}), durable=True)
