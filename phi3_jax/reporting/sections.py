"""The parts of a report: figures, laws, scores, comparisons, runs and notes, as HTML."""

from __future__ import annotations

import base64
import importlib
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.family import ROUNDED, TRIO
from phi3_jax.records import files
from phi3_jax.records.table import Run, Study, row, what_was_trained
from phi3_jax.reporting import markup
from phi3_jax.reporting.gains import Difference, between_arms, between_sizes, budgets, cells, gains
from phi3_jax.reporting.sentences import digits, interval, lag_sentences, quantity, unit
from phi3_jax.reporting.walltime import wall_time_table
from phi3_jax.scaling.endpoints import Endpoint, endpoints, log_odds_sensible, main_endpoints, plotted_losses
from phi3_jax.units import human_count


def figure_list(drawn: Sequence[Any], left_out: Sequence[str], label: str) -> str:
    """Figures with their captions, their files and what was trained, and a line for each that was left out."""
    parts = []
    for figure in drawn:
        data = base64.b64encode(figure.svg.read_bytes()).decode()
        links = " ".join(f'<a href="figures/{p.name}">{p.suffix[1:].upper()}</a>' for p in (figure.png, figure.svg))
        parts.append(
            f"<h3>{markup.text(figure.title)}</h3><figure><img alt='{markup.text(figure.title)}' "
            f'src="data:image/svg+xml;base64,{data}"><figcaption>{markup.text(figure.caption)} '
            f"{markup.text(label)}. {links}</figcaption></figure>"
        )
    if left_out:
        parts.append(f'<p class="small">Figures left out:</p>{markup.items(map(markup.text, left_out))}')
    return "\n".join(parts)


def forecasts(study: Study) -> list[Any]:
    """The scored forecasts of a study; none, and a line in words, where the file is damaged.

    Raises:
      UserError: the file was edited, or changed after a run began.
    """
    from phi3_jax.scaling import forecast

    try:
        return forecast.score(study)
    except forecast.Unreadable as error:
        line = f"no forecast is scored, and laws are fitted to all runs: {error}"
        print(f"warning: {line}", file=sys.stderr)
        study.missing.append(line)
        return []


def laws(study: Study, runs: list[Run], suffix: str, scores: Sequence[Any] = ()) -> str:
    """The loss laws that the runs determine, a sentence on those that they do not, and the forecasts that were scored."""
    parts = []
    cards: dict[str, dict[str, Any]] = {}
    reasons: dict[str, list[str]] = {}
    held = {s.run for s in scores}
    for end in plotted_losses(endpoints(runs)):
        name = f"law-{end.suite}-{end.task}{suffix}".replace(" ", "_")
        paths = [study.folder / "figures" / f"{name}.{kind}" for kind in ("svg", "png")]
        reason, card, drawn = _law(
            study,
            runs,
            [r for r in runs if r.name not in held],
            end,
            [s for s in scores if s.endpoint == end.column],
            paths,
        )
        cards |= {end.column: card} if card else {}
        if reason:
            reasons.setdefault(reason, []).append(quantity(end))
            for path in paths:  # of an earlier report
                path.unlink(missing_ok=True)
        else:
            parts.append(drawn)
    for reason, names in reasons.items():
        parts.append(f"<p>No law is shown of the {markup.text(' and the '.join(names))}: {markup.text(reason)}.</p>")
    if cards:
        path = study.folder / f"fit_card{suffix}.json"
        files.write_json(path, cards)
        parts.append(
            f'<p class="small">How these laws were fitted, as a checklist: <a href="{path.name}">{path.name}</a>.</p>'
        )
    return "\n".join(["<h3>Loss laws</h3>", *parts, _forecasts(scores)]) if parts or scores else ""


def _law(
    study: Study, runs: list[Run], fitted: list[Run], end: Endpoint, scores: Sequence[Any], paths: Sequence[Path]
) -> tuple[str | None, dict[str, Any] | None, str]:
    """Why there is no law of a loss (None where there is one), its card where a search ended, and its HTML."""
    from matplotlib import rc_context

    from phi3_jax.reporting import figures
    from phi3_jax.reporting import laws as pictures
    from phi3_jax.scaling import fit as fitting
    from phi3_jax.scaling import forecast, intervals
    from phi3_jax.scaling import laws as search

    try:
        fit, trunks = forecast.fit_runs(fitted, end)
    except UserError as error:
        return str(error), None, ""
    columns = {"n": "non_embedding", "d": "budget", "loss": end.column}
    worth = intervals.worth(fit, trunks)
    result = fitting.describe(fit, worth, columns)
    card = fitting.card(result, study.folder / "runs.csv")
    if not result["determined"]:
        return result["reason"], card, ""
    with rc_context(figures.STYLE):
        figure = pictures.frontier(fit, scores, what_was_trained(runs), end.unit)
        figures.save(figure, *paths)
    caption = f"Fitted to {len(fit.n)} runs of {int(search.sizes(fit.n).max()) + 1} sizes; lines are the law. " + (
        "The starred runs were forecast before they started and are not in the fit." if scores else ""
    )
    drawn = figures.Drawn(paths[0].stem, f"The law of the {quantity(end)}", caption, *paths)
    header, lines = pictures.law_table(fit, worth)
    return (
        None,
        card,
        figure_list([drawn], (), what_was_trained(runs)) + markup.table(header, [("", line) for line in lines]),
    )


def _forecasts(scores: Sequence[Any]) -> str:
    from phi3_jax.reporting import laws as pictures

    if not scores:
        return ""
    header, lines = pictures.score_table(scores)
    done = [s for s in scores if s.measured is not None]
    parts = [
        "<h3>Forecasts, written down before these runs started, and what came</h3>",
        markup.table(header, [("", line) for line in lines], text_columns=2),
    ]
    if done:
        inside = sum(bool(s.inside) for s in done)
        parts.append(f"<p>{inside} of {len(done)} measured losses lie in their 95% prediction interval.</p>")
    return "\n".join(parts)


def scores(runs: list[Run]) -> str:
    """Final scores by size and budget with intervals, a row a quantity."""
    seeds = len({run.seed for run in runs if run.finals})
    ends = endpoints(runs)
    if not ends:
        return ""
    rows, members = [], []
    for run in sorted(runs, key=lambda r: r.size or 0):
        members += [run.member] if run.finals and run.member not in members else []
    for end in ends:
        table = cells(runs, end)
        factor, places = (100, 1) if end.proportion else (1, 3)
        for budget in budgets(table.values()):
            found = [table.get((m, budget)) for m in members]
            values = []
            for c in found:
                text = "–" if c is None else f"{factor * c.value:.{places}f}"
                if c is not None and c.low is not None and c.high is not None:
                    text += f" [{factor * c.low:.{places}f}, {factor * c.high:.{places}f}]"
                values.append(text)
            n = next((c.n for c in found if c is not None and c.n), None)
            chance = next((c.chance for c in found if c is not None and c.chance is not None), None)
            rows.append(("", [end.label, budget, end.unit, *values, f"{n:,}" if n else "–",
                              "–" if chance is None else f"{factor * chance:.2g}"]))  # fmt: skip
    header = ["Final score", "tokens", "unit", *members, "items", "chance"]
    over = "over seeds and test items" if seeds > 1 else "over test items alone: one seed says nothing of training"
    return f"<h3>Scores in numbers, with 95% intervals {over}</h3>" + markup.table(header, rows)


def gain_table(runs: list[Run]) -> str:
    """The numbers behind the figure of gains."""
    rows = []
    for end in endpoints(runs):
        if not (end.down or end.metric in ("recall", "exact", "accuracy")):
            continue  # controls, and quantities of which more is not better
        for scale in ["points" if end.proportion else "unit"] + (["logit"] if log_odds_sensible(end) else []):
            for gain in gains(runs, end, scale):
                places = digits(gain)
                found = [interval(e, places) for e in (gain.first, gain.second, gain.contrast)]
                rows.append(("", [end.label, gain.budget, unit(gain), *found, str(gain.seeds)]))
    if not rows:
        return difference_table(
            "Each size minus the next smaller one", [d for e in endpoints(runs) for d in between_sizes(runs, e)]
        )
    steps = [f"{a} to {b} ({ROUNDED[a]} to {ROUNDED[b]})" for a, b in itertools.pairwise(TRIO)]
    note = (
        '<p class="small">Positive is better: a falling loss counts as a gain. A law without any '
        "mixture effect already predicts a weaker second step for the loss (0.79 of the first per "
        "doubling at matched tokens, from the Chinchilla law as re-fitted in arXiv:2404.10102 and read "
        "far outside its fit), so a ratio near that is no evidence about data. Seeds are paired; an interval "
        "of one seed takes how far seeds lie apart from other runs (analysis/results/seed_sd.csv). Item "
        "errors are taken as independent between sizes, which is conservative for shared test items.</p>"
    )
    header = ["Gain per doubling of parameters", "tokens", "unit", *steps, "second minus first", "seeds"]
    title = "Gains in numbers, with 95% intervals" if any("[" in "".join(r[1]) for r in rows) else "Gains in numbers"
    return f"<h3>{title}</h3>" + markup.table(header, rows) + note


def difference_table(title: str, found: Sequence[Difference], second: Sequence[str] = ()) -> str:
    """Paired differences with their intervals; `second` names what each is of where that is more than a size."""
    lines = []
    for i, d in enumerate(found):
        places, of = (1, "points") if d.endpoint.proportion else (3, d.endpoint.unit + " saved" * d.endpoint.down)
        name = [second[i]] if second else []
        lines.append(("", [*name, d.endpoint.label, d.member, d.budget, of, interval(d.value, places), str(d.seeds)]))
    if not lines:
        return ""
    header = [*["arm"] * bool(second), "Difference", "size", "tokens", "unit", "over the same seeds", "seeds"]
    note = '<p class="small">Paired by seed; 95% intervals (Student\'s t); of one seed with the noise of other runs. '
    note += "Positive is better.</p>"
    return f"<h3>{markup.text(title)}</h3>" + markup.table(header, lines, text_columns=2 + bool(second)) + note


def arm_differences(study: Study) -> str:
    """Every arm minus the first over the seeds that both have, at each size's last budget."""
    (first, base), *others = study.arms.items()
    ends, names = main_endpoints(endpoints(study.runs)), []
    found: list[Difference] = []
    for name, runs in others:
        for end in ends:
            here = between_arms(base, runs, end)
            last = {d.member: d for d in here}  # budgets rise
            found += last.values()
            names += [name] * len(last)
    return difference_table(f"Each arm minus “{first}”", found, names)


def training_note(runs: list[Run]) -> str:
    """What equal tokens say of forks and trunks."""
    return "".join(f"<p>{markup.text(sentence)}</p>" for sentence in lag_sentences(runs))


def arm_sections(study: Study, rows: list[Any], config: dict[str, Any], verdict: Any) -> str:
    """Figures and tables of a study with arms."""
    from phi3_jax.reporting import arms

    if not rows:
        return ""
    parts = [
        figure_list(
            arms.draw(study.folder / "figures", rows, config, verdict, what_was_trained(study.runs)),
            (),
            what_was_trained(study.runs),
        )
    ]
    tables = [("The interaction in numbers, with 95% intervals", arms.effect_table(verdict))] if verdict else []
    for title, (header, lines) in (*tables, ("Scores of each arm, means over seeds", arms.arm_table(rows))):
        if lines:
            parts += [f"<h3>{title}</h3>", markup.table(header, [("", line) for line in lines], text_columns=2)]
    parts.append(arm_differences(study))
    return "\n".join(parts)


def rule(study: Study) -> str:
    """What the rule of an experiment that names one (`config.verdict`) says of its runs, and its module's `figures`."""
    named = str(study.meta.get("design", {}).get("config", {}).get("verdict") or "")
    module, _, function = named.partition(":")
    if not module.startswith("phi3_jax."):
        return ""
    try:
        of_rule = importlib.import_module(module)
        said = getattr(of_rule, function)(study.folder)
        drawn = of_rule.figures(study.folder) if hasattr(of_rule, "figures") else []
    except (UserError, ImportError, AttributeError) as error:
        study.missing.append(f"the rule says nothing yet: {error}")
        return ""
    shown = figure_list(drawn, (), what_was_trained(study.runs)) if drawn else ""
    return f"<h2>By the rule written before the runs</h2><pre>{markup.text(chr(10).join(said))}</pre>{shown}"


def run_tables(study: Study) -> str:
    """Every run in tables that fit a page: what it is, its cost (planned and measured), its scores, a table a suite."""
    if not study.runs:
        return ""
    what = []
    for run in study.runs:
        r = row(run)
        what.append((_css(run), [
            r["name"], r["label"], r["status"], str(r["seed"]), markup.count(r["parameters"]),
            markup.count(r["non_embedding"]), human_count(r["published_parameters"]), markup.count(r["tokens"]),
            str(r["fingerprint"] or "–"),
        ]))  # fmt: skip
    header = ["Run", "label", "status", "seed", "parameters", "non-embedding", "stands for", "tokens", "fingerprint"]
    note = (
        '<p class="small">Tokens and FLOPs of a fork count its trunk up to the fork; its time does '
        "not. Memory is the largest resident set of the process, which the runs of one trunk share. "
        "Scores are of the last step of finished runs. The same tables, unrounded: <a "
        'href="runs.csv">runs.csv</a>.</p>'
    )
    parts = ["<h2>Runs</h2>", markup.table(header, what, text_columns=3), _costs(study), wall_time_table(study.runs)]
    return "\n".join([*parts, *_run_scores(study), note])


def _css(run: Run) -> str:
    return "" if run.finished else "off"


def _costs(study: Study) -> str:
    timed = any(row(run)["seconds_predicted"] for run in study.runs)
    lines = []
    for run in study.runs:
        r = row(run)
        times = [markup.duration(r["seconds_predicted"])] * timed + [markup.duration(r["seconds"])]
        memory = [markup.size_in_bytes(r["peak_bytes_predicted"]), markup.size_in_bytes(r["peak_bytes"])]
        speed = [markup.count(r["tokens_per_s"]), markup.seconds(r["compile_s"])]
        flops = [markup.power(r["flops_predicted"]), markup.power(r["flops"])]
        end = [markup.count(r["skipped"]), markup.decimal(r["train_loss"])]
        lines.append((_css(run), [r["name"], *flops, *times, *memory, *speed, *end]))
    header = ["Run", "FLOPs planned", "FLOPs done", *["time planned"] * timed, "time", "memory planned", "peak memory"]
    header += ["tokens/s", "compile time", "skipped steps", "training loss (nats)"]
    return "<h3>Cost, planned and measured</h3>" + markup.table(header, lines)


COLUMNS = 8  # of scores beside a run's name: what 1,280 pixels hold


def _run_scores(study: Study) -> Iterable[str]:
    """Scores of each run, a table a suite, so that none is cut off at the page's edge."""
    ends = endpoints(study.runs)
    for suite in dict.fromkeys(e.suite for e in ends):
        mine = [e for e in ends if e.suite == suite]
        for part in (mine[i : i + COLUMNS] for i in range(0, len(mine), COLUMNS)):
            lines = []
            for run in study.runs:
                values = row(run)
                found = [(values.get(e.column), (100, 1) if e.proportion else (1, 3)) for e in part]
                lines.append((_css(run), [run.name, *(markup.decimal(v, *how) for v, how in found)]))
            yield f"<h3>Scores of each run: {markup.text(suite)}</h3>"
            yield markup.table(["Run", *(f"{e.label} ({e.unit})" for e in part)], lines)


def notes(study: Study) -> str:
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
    named = (r.record["packages"] for r in study.runs if isinstance(r.record.get("packages"), dict))
    packages: dict[str, str] = next(named, {})
    lines += [f"Packages: {', '.join(f'{k} {v}' for k, v in packages.items())}."] if packages else []
    parts = ["<h2>Notes</h2>", markup.items(map(markup.text, lines))]
    if study.meta.get("command"):
        parts.append(f"<p>Made by</p><pre>{markup.text(study.meta['command'])}</pre>")
    if study.lines:
        parts.append(f"<p>What the full run is:</p><pre>{markup.text(chr(10).join(study.lines))}</pre>")
    return "\n".join(parts)
