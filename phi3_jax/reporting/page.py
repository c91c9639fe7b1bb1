"""The report of a study: one HTML page that needs nothing else, `figures/` beside it, and `runs.csv`."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.reporting.gains import (
    Endpoint,
    Estimate,
    Gain,
    budgets,
    cells,
    endpoints,
    gains,
    log_odds_sensible,
    plotted_losses,
    recall_ceiling,
)
from phi3_jax.reporting.table import (
    MEMBERS,
    PUBLISHED,
    Run,
    Study,
    human,
    read_study,
    row,
    what_was_trained,
    write_csv,
)
from phi3_jax.reporting.walltime import wall_time_table

STYLE = """
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;color:#1b1b1b;
background:#fff;
max-width:1090px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 6px}
h2{font-size:21px;margin:40px 0 8px;border-bottom:1px solid #ddd}
h3{font-size:17px;margin:28px 0 4px}p{margin:8px 0}.label{font-size:18px;font-weight:600;color:#7a3b00}
pre{background:#f4f4f2;padding:10px 12px;overflow-x:auto;font-size:14px;white-space:pre-wrap;margin:8px 0}
.headline{background:#eef5fb;border-left:4px solid #0072B2;padding:8px 16px;margin:16px 0}
.missing{background:#fdf3e7;border-left:4px solid #D55E00;padding:8px 16px;margin:16px 0}
figure{margin:16px 0 8px}figure img{width:100%;height:auto;display:block}
figcaption{font-size:14.5px;color:#444;margin-top:4px}
.scroll{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:4px 6px;border-bottom:1px solid #e2e2e2;text-align:right;white-space:nowrap}
thead th{border-bottom:2px solid #888;
vertical-align:bottom;background:#fff;white-space:normal;min-width:52px}
th:first-child,td.text,th.text{text-align:left}th:first-child{position:sticky;left:0;
background:#fff}tr.off td{color:#8a5a2b}
.bar{display:flex;width:100px;height:12px}.key{display:block;width:9px;height:9px;margin-left:auto}
.small{font-size:14px;color:#444}li{margin:3px 0}
"""


def write_report(study_dir: Path) -> Path:
    """Writes `report.html`, `figures/*.svg|png` and `runs.csv` into a study folder; returns the page's path.

    Whatever is missing from the study is left out and said on the page.

    Raises:
      UserError: the folder does not exist.
    """
    from phi3_jax.reporting import figures  # matplotlib only from here on

    study = read_study(study_dir)
    folder = study.folder / "figures"
    write_csv(study, study.folder / "runs.csv")
    found = _arms(study)
    body = [_head(study, found)]
    many = len(study.arms) > 1
    if found:
        body.append(_arm_sections(study, *found))
    for number, (name, runs) in enumerate(() if found else study.arms.items(), 1):
        drawn, left_out = figures.draw(runs, folder, f"-{number}" if many else "")
        body.append(f"<h2>{_text(name[0].upper() + name[1:])}</h2>" if many else "")
        body.append(_figures(drawn, left_out, runs))
        body.append(_laws(study, runs, f"-{number}" if many else ""))
        body.append(_scores(runs))
        body.append(_gains(runs))
    body += [_run_table(study), _notes(study)]
    title = _text(_title(study))
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head>\n<body>\n" + "\n".join(filter(None, body)) + "\n</body></html>\n"
    )
    path = study.folder / "report.html"
    partial = path.with_suffix(".html.partial")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _arms(study: Study) -> tuple[list[Any], dict[str, Any], Any] | None:
    """Rows, config and verdict (None without a rule that can be read) of a study with arms; None for others."""
    config = study.meta.get("design", {}).get("config", {})
    if not any(run.arm for run in study.runs):
        return None
    from phi3_jax.scaling import causal

    try:
        if config.get("rule"):
            return causal.of_study(study.folder)
    except UserError as error:
        study.missing.append(f"the rule cannot be read yet: {error}")
    try:
        return causal.read(study.folder / "runs.csv"), config, None
    except UserError:
        return [], config, None


def _arm_sections(study: Study, rows: list[Any], config: dict[str, Any], verdict: Any) -> str:
    """Figures and tables of a study with arms."""
    from phi3_jax.reporting import arms

    if not rows:
        return ""
    parts = [
        _figures(
            arms.draw(study.folder / "figures", rows, config, verdict, what_was_trained(study.runs)), (), study.runs
        )
    ]
    tables = [("The interaction in numbers, with 95% intervals", arms.effect_table(verdict))] if verdict else []
    for title, (header, lines) in (*tables, ("Scores of each arm, means over seeds", arms.arm_table(rows))):
        parts += [f"<h3>{title}</h3>", _table(header, [("", line) for line in lines], text_columns=2)]
    return "\n".join(parts)


def _text(value: Any) -> str:
    return html.escape(str(value))


def _title(study: Study) -> str:
    return str(study.meta.get("title") or study.meta.get("name") or study.folder.resolve().name)


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _head(study: Study, found: tuple[Any, ...] | None = None) -> str:
    parts = [
        f"<h1>{_text(_title(study))}</h1>",
        f'<p class="label">{_text(what_was_trained(study.runs))}.</p>',
    ]
    if study.meta.get("command"):
        parts.append(f"<p>Made by</p><pre>{_text(study.meta['command'])}</pre>")
    if study.lines:
        parts.append(f"<p>What the full run is:</p><pre>{_text(chr(10).join(study.lines))}</pre>")
    if found and (verdict := found[2]):
        sentences = [
            f"<b>By the rule written before the runs: {_text(verdict.word)}.</b>",
            *map(_text, verdict.findings),
        ]
    elif found:
        sentences = [f"{sum(run.finished for run in study.runs)} of {len(study.runs)} runs have finished."]
    else:
        sentences = [_text(s) for s in headlines(study)]
    parts.append(f'<div class="headline">{"".join(f"<p>{s}</p>" for s in sentences)}</div>')
    if study.missing:
        shown = [_text(m[0].upper() + m[1:] + ".") for m in study.missing]
        rest = f"<details><summary>and {len(shown) - 8} more</summary>{_list(shown[8:])}</details>" if shown[8:] else ""
        parts.append(f'<div class="missing"><p>What is missing from this study:</p>{_list(shown[:8])}{rest}</div>')
    return "\n".join(parts)


# ------------------------------------------------------------------------------------------------ headline


def headlines(study: Study) -> list[str]:
    """What the data say, in sentences computed from it and no stronger than its intervals."""
    out = []
    for name, runs in study.arms.items():
        prefix = f"{name[0].upper() + name[1:]}: " if len(study.arms) > 1 else ""
        out += [prefix + sentence for sentence in _arm_headlines(runs)]
    return out or ["There is no run in this study yet."]


def _arm_headlines(runs: list[Run]) -> list[str]:
    done = [r for r in runs if r.finished]
    if not done:
        return [f"None of the {len(runs)} run(s) has finished, so there is nothing to compare yet."]
    found = _headline_gains(runs)
    if found:
        limits = [*_floor_sentences(runs, found), *_ceiling_sentence(runs)]
        return [*(_gain_sentence(g) for g in found), *limits, _seed_sentence(found[0].seeds)]
    ends = endpoints(runs)
    if not ends:
        return [f"{len(done)} run(s) finished, none with an evaluation at its last step: nothing to compare."]
    return [*(_score_sentence(runs, e) for e in _main_endpoints(ends)[:3]), _why_no_gains(runs)]


def _main_endpoints(ends: Sequence[Endpoint]) -> list[Endpoint]:
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


def _headline_gains(runs: list[Run]) -> list[Gain]:
    """Gains at the largest budget for the main endpoints."""
    out = []
    for end in _main_endpoints(endpoints(runs)):
        found = gains(runs, end, "points" if end.proportion else "unit")
        out += found[-1:]
    return out


def _unit(gain: Gain) -> str:
    return "points" if gain.scale == "points" else "log-odds" if gain.scale == "logit" else gain.endpoint.unit


def interval(value: Estimate, digits: int) -> str:
    """'+18.3 [17.7, 18.9]', or '+18.3 (no interval)'."""
    text = f"{value.value:+z.{digits}f}".replace("-", "−")
    if value.low is None or value.high is None:
        return f"{text} (no interval)"
    return f"{text} [{value.low:z.{digits}f}, {value.high:z.{digits}f}]".replace("-", "−")


def _digits(gain: Gain) -> int:
    return 1 if gain.scale == "points" else 2 if gain.scale == "logit" else 3


def _quantity(end: Endpoint) -> str:
    return end.label[0].lower() + end.label[1:]


def _gain_sentence(gain: Gain) -> str:
    digits, unit = _digits(gain), _unit(gain)
    verb = "loss saved" if gain.endpoint.down else "gain"
    text = (
        f"At {gain.budget} tokens, {_quantity(gain.endpoint)}: {verb} per doubling of parameters "
        f"{interval(gain.first, digits)} {unit} from mini to small beside "
        f"{interval(gain.second, digits)} from small to medium; second minus first "
        f"{interval(gain.contrast, digits)}. "
    )
    unsure = [
        name
        for name, value in (("first gain", gain.first), ("second gain", gain.second))
        if value.low is not None and not value.sign
    ]
    if gain.contrast.low is None:
        text += "Without an interval this is a description, not a test."
    elif gain.contrast.sign:
        which = "larger" if gain.contrast.sign > 0 else "smaller"
        text += f"The second step is {which}; the interval excludes 0."
    else:
        text += "The interval of the difference includes 0: these runs do not tell the two steps apart."
    if unsure:
        text += f" The interval of the {' and of the '.join(unsure)} includes 0 too."
    return text


def _floor_sentences(runs: list[Run], found: Sequence[Gain]) -> list[str]:
    """A warning for every share that no size lifts a point above chance: it cannot show a gain."""
    out = []
    for gain in found:
        here = [c for c in cells(runs, gain.endpoint).values() if c.budget == gain.budget]
        if gain.endpoint.proportion and all(c.value < (c.chance or 0.0) + 0.01 for c in here):
            out.append(
                f"No size is a point above chance in {_quantity(gain.endpoint)} at {gain.budget} tokens: its "
                "gains are noise, train longer."
            )
    return out


def _ceiling_sentence(runs: list[Run]) -> list[str]:
    """A warning where the largest size has learned nearly all that its corpus holds."""
    ceiling = recall_ceiling(runs)
    end = next((e for e in endpoints(runs) if e.key == ("knowledge", "universe", "recall")), None)
    if ceiling is None or end is None:
        return []
    table = cells(runs, end)
    cell = table.get(("medium", budgets(table.values())[-1]))
    if cell is None or cell.value < 0.95 * ceiling:
        return []
    return [
        f"Medium recalls {100 * cell.value:.1f}% of the universe, where the corpus itself stops at "
        f"{100 * ceiling:.1f}%: facts that were filtered out cannot be known, so a weaker second step "
        "in knowledge is here a ceiling made by the data. In log-odds of the facts in the corpus it "
        "can look different; see the figure of gains."
    ]


def _seed_sentence(seeds: int) -> str:
    if seeds == 1:
        return (
            "One seed a size: the 95% intervals cover the sampling of test items, not the seeds of "
            "training. Another seed can move these numbers by more than the intervals show; seeds=3 "
            "measures that."
        )
    return (
        f"{seeds} seeds a size: the 95% intervals cover seeds (Student's t over {seeds}) and test "
        "items; the data set is the same for all of them."
    )


def _score_sentence(runs: list[Run], end: Endpoint) -> str:
    table = cells(runs, end)
    largest = budgets(table.values())[-1]
    factor, unit = (100, "%") if end.proportion else (1, f" {end.unit}")
    digits = 1 if end.proportion else 3
    parts = [
        f"{c.member} {factor * c.value:.{digits}f}{unit}"
        + (f" [{factor * c.low:.{digits}f}, {factor * c.high:.{digits}f}]" if c.low is not None else "")
        for c in sorted(table.values(), key=lambda c: c.size)
        if c.budget == largest
    ]
    quantity = _quantity(end)
    return f"At {largest} tokens, {quantity}: {', '.join(parts)}."


def _why_no_gains(runs: list[Run]) -> str:
    done = {r.member for r in runs if r.finals}
    lacking = [m for m in MEMBERS if m not in done]
    if lacking:
        return f"Gains per doubling need all three sizes; there is no evaluated run of {', '.join(lacking)}."
    return "Gains per doubling need the three sizes at one budget with a seed in common."


# ------------------------------------------------------------------------------------------------ sections


def _figures(drawn: Sequence[Any], left_out: Sequence[str], runs: list[Run]) -> str:
    label = what_was_trained(runs)
    parts = []
    for figure in drawn:
        data = base64.b64encode(figure.svg.read_bytes()).decode()
        files = " ".join(f'<a href="figures/{p.name}">{p.suffix[1:].upper()}</a>' for p in (figure.png, figure.svg))
        parts.append(
            f"<h3>{_text(figure.title)}</h3><figure><img alt='{_text(figure.title)}' "
            f'src="data:image/svg+xml;base64,{data}"><figcaption>{_text(figure.caption)} '
            f"{_text(label)}. {files}</figcaption></figure>"
        )
    if left_out:
        parts.append(f'<p class="small">Figures left out:</p>{_list(map(_text, left_out))}')
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text_columns: int = 1) -> str:
    """An HTML table; each row is (CSS class, cells); the first columns are left-aligned text."""

    def kind(i: int) -> str:
        return ' class="text"' if i < text_columns else ""

    head = "".join(f"<th{kind(i)}>{_text(h)}</th>" for i, h in enumerate(header))
    body = "".join(
        f'<tr class="{css}">'
        + "".join(f"<th>{_text(v)}</th>" if i == 0 else f"<td{kind(i)}>{_text(v)}</td>" for i, v in enumerate(values))
        + "</tr>"
        for css, values in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _laws(study: Study, runs: list[Run], suffix: str) -> str:
    """The loss laws that the runs determine, and the forecasts made before some of them."""
    from matplotlib import rc_context

    from phi3_jax.reporting import figures
    from phi3_jax.reporting import laws as pictures
    from phi3_jax.scaling import fit as fitting
    from phi3_jax.scaling import forecast, laws

    scores, parts, cards = forecast.score(study), [], {}
    held = {s.run for s in scores}
    for end in plotted_losses(endpoints(runs)):
        found = forecast.fit_runs([r for r in runs if r.name not in held], end)
        if found is None:
            continue
        fit, clusters = found
        draws = laws.bootstrap(fit, 500, clusters=clusters)
        mine = [s for s in scores if s.endpoint == end.column]
        name = f"law-{end.suite}-{end.task}{suffix}".replace(" ", "_")
        with rc_context(figures.STYLE):
            figure = pictures.frontier(fit, mine, what_was_trained(runs), end.unit)
            files = [study.folder / "figures" / f"{name}.{kind}" for kind in ("svg", "png")]
            figure.savefig(files[0], metadata={"Date": None})
            figure.savefig(files[1], dpi=150)
        caption = f"Fitted to {len(fit.n)} runs of {int(laws.sizes(fit.n).max()) + 1} sizes; lines are the law. " + (
            "The starred runs were forecast before they started and are not in the fit. " if mine else ""
        )
        if fit.edges:
            caption += f"At a bound, so not determined by these runs: {', '.join(fit.edges)}."
        title = f"The law of the {end.label[0].lower() + end.label[1:]}"
        parts.append(_figures([figures.Drawn(name, title, caption, *files)], (), runs))
        header, lines = pictures.law_table(fit, draws)
        parts.append(_table(header, [("", line) for line in lines]))
        columns = {"n": "non_embedding", "d": "budget", "loss": end.column}
        result = fitting.describe(fit, draws, len(set(clusters)) if clusters else len(fit.n), columns)
        cards[end.column] = fitting.card(result, study.folder / "runs.csv")
    if cards:
        path = study.folder / f"fit_card{suffix}.json"
        path.write_text(json.dumps(cards, indent=1) + "\n")
        parts.append(
            f'<p class="small">How these laws were fitted, as a checklist: <a href="{path.name}">{path.name}</a>.</p>'
        )
    if scores:
        header, lines = pictures.score_table(scores)
        done = [s for s in scores if s.measured is not None]
        parts.append("<h3>Forecasts, written down before these runs started, and what came</h3>")
        parts.append(_table(header, [("", line) for line in lines], text_columns=2))
        if done:
            inside = sum(bool(s.inside) for s in done)
            parts.append(f"<p>{inside} of {len(done)} measured losses lie in their 95% prediction interval.</p>")
    return "\n".join(parts)


def _scores(runs: list[Run]) -> str:
    """Final scores by size and budget with intervals, a row a quantity."""
    ends = endpoints(runs)
    if not ends:
        return ""
    rows, members = [], []
    for run in sorted(runs, key=lambda r: r.size or 0):
        members += [run.member] if run.finals and run.member not in members else []
    for end in ends:
        table = cells(runs, end)
        factor, digits = (100, 1) if end.proportion else (1, 3)
        for budget in budgets(table.values()):
            found = [table.get((m, budget)) for m in members]
            values = []
            for c in found:
                text = "–" if c is None else f"{factor * c.value:.{digits}f}"
                if c is not None and c.low is not None and c.high is not None:
                    text += f" [{factor * c.low:.{digits}f}, {factor * c.high:.{digits}f}]"
                values.append(text)
            n = next((c.n for c in found if c is not None and c.n), None)
            chance = next((c.chance for c in found if c is not None and c.chance is not None), None)
            rows.append(("", [end.label, budget, end.unit, *values, f"{n:,}" if n else "–",
                              "–" if chance is None else f"{factor * chance:.2g}"]))  # fmt: skip
    header = ["Final score", "tokens", "unit", *members, "items", "chance"]
    return "<h3>Scores in numbers, with 95% intervals</h3>" + _table(header, rows)


def _gains(runs: list[Run]) -> str:
    """The numbers behind the figure of gains."""
    rows = []
    for end in endpoints(runs):
        if not (end.down or end.metric in ("recall", "exact", "accuracy")):
            continue  # controls, and quantities of which more is not better
        for scale in ["points" if end.proportion else "unit"] + (["logit"] if log_odds_sensible(end) else []):
            for gain in gains(runs, end, scale):
                digits = _digits(gain)
                found = [interval(e, digits) for e in (gain.first, gain.second, gain.contrast)]
                rows.append(("", [end.label, gain.budget, _unit(gain), *found, str(gain.seeds)]))
    if not rows:
        return ""
    steps = [f"{a} to {b} ({PUBLISHED[a]} to {PUBLISHED[b]})" for a, b in itertools.pairwise(MEMBERS)]
    note = (
        '<p class="small">Positive is better: a falling loss counts as a gain. A law without any '
        "mixture effect already predicts a weaker second step for the loss (0.79 of the first per "
        "doubling at matched tokens, from the Chinchilla law as re-fitted in arXiv:2404.10102 and read "
        "far outside its fit), so a ratio near that is no evidence about data. Item errors are taken "
        "as independent between sizes, which is conservative for shared test items.</p>"
    )
    header = ["Gain per doubling of parameters", "tokens", "unit", *steps, "second minus first", "seeds"]
    return "<h3>Gains in numbers, with 95% intervals</h3>" + _table(header, rows) + note


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.1f} min"
        if seconds < 36000
        else f"{seconds / 3600:.1f} h"
    )


def _bytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 1e9:.2f} GB" if count < 1e12 else f"{count / 1e12:.1f} TB"


def _run_table(study: Study) -> str:
    """Every run in three tables that fit a page: what it is, its cost (planned and measured), its scores."""
    if not study.runs:
        return ""
    ends: dict[str, Endpoint] = {e.column: e for e in endpoints(study.runs)}
    timed = any(row(run)["seconds_predicted"] for run in study.runs)
    what, cost, scores = [], [], []
    for run in study.runs:
        r, css = row(run), "" if run.finished else "off"
        what.append((css, [r["name"], r["label"], r["status"], str(r["seed"]), _count(r["parameters"]),
                           _count(r["non_embedding"]), human(r["published_parameters"]), _count(r["tokens"]),
                           str(r["fingerprint"] or "–")]))  # fmt: skip
        times = [_duration(r["seconds_predicted"])] * timed + [_duration(r["seconds"])]
        memory = [_bytes(r["peak_bytes_predicted"]), _bytes(r["peak_bytes"])]
        speed = [_count(r["tokens_per_s"]), _seconds(r["compile_s"])]
        flops = [_power(r["flops_predicted"]), _power(r["flops"])]
        end = [_count(r["skipped"]), _decimal(r["train_loss"])]
        cost.append((css, [r["name"], *flops, *times, *memory, *speed, *end]))
        finals = ((e, r.get(column)) for column, e in ends.items())
        scores.append((css, [r["name"], *(_decimal(v, 100, 1) if e.proportion else _decimal(v) for e, v in finals)]))
    header = [
        "Run",
        "label",
        "status",
        "seed",
        "parameters",
        "non-embedding",
        "stands for",
        "tokens",
        "fingerprint",
    ]
    parts = ["<h2>Runs</h2>", _table(header, what, text_columns=3)]
    header = [
        "Run",
        "FLOPs planned",
        "FLOPs done",
        *["time planned"] * timed,
        "time",
        "memory planned",
        "peak memory",
    ]
    header += ["tokens/s", "compile time", "skipped steps", "training loss (nats)"]
    parts += ["<h3>Cost, planned and measured</h3>", _table(header, cost), wall_time_table(study.runs)]
    if ends:
        header = ["Run", *(f"{e.label} ({e.unit})" for e in ends.values())]
        parts += ["<h3>Scores of each run</h3>", _table(header, scores)]
    parts.append(
        '<p class="small">Tokens and FLOPs of a fork count its trunk up to the fork; its time does '
        "not. Memory is the largest resident set of the process, which the runs of one trunk share. "
        "Scores are of the last step of finished runs. The same tables, unrounded: <a "
        'href="runs.csv">runs.csv</a>.</p>'
    )
    return "\n".join(parts)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f} s"


def _decimal(value: float | None, factor: float = 1.0, digits: int = 3) -> str:
    return "–" if value is None else f"{factor * value:.{digits}f}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _power(value: float | None) -> str:
    return "–" if value is None else f"{value:.2e}".replace("e+", "e")


def _notes(study: Study) -> str:
    """What a reader needs to trust or repeat the page."""
    lines = [
        "Sizes on axes are non-embedding matrix parameters of the models that were trained; the "
        "released sizes are named only where a proxy stands for one.",
        "Intervals: Wilson for a share of one run; over several seeds Student's t, with the error over "
        "items added in quadrature because all seeds share the items.",
    ]
    if study.unmatched:
        lines.append("Budgets written like 2.8M/4M/4M are not matched: mini, small and medium saw that many tokens.")
    for key, name in (("device", "Trained on"), ("git_commit", "Code at commit")):
        found = sorted({str(r.record[key]) for r in study.runs if r.record.get(key)})
        lines += [f"{name}: {', '.join(found)}."] if found else []
    packages = next((r.record["packages"] for r in study.runs if isinstance(r.record.get("packages"), dict)), {})
    lines += [f"Packages: {', '.join(f'{k} {v}' for k, v in packages.items())}."] if packages else []
    return "<h2>Notes</h2>" + _list(map(_text, lines))
