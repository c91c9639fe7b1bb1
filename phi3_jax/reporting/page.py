"""The report of a study: one HTML page that needs nothing else, `figures/` beside it, and `runs.csv`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.records import files
from phi3_jax.records.table import Study, read_study, what_was_trained, write_csv
from phi3_jax.reporting import markup, sections
from phi3_jax.reporting.sentences import between, headlines, question, rule_question


def write_report(study_dir: Path) -> Path:
    """Writes `report.html`, `figures/*.svg|png` and `runs.csv` into a study folder; returns the page's path.

    Whatever is missing from the study is left out and said on the page.

    Raises:
      UserError: the folder does not exist or cannot be written to, or its scores come from several scorers.
    """
    study = read_study(study_dir)
    try:
        return _write(study)
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {study.folder}: {error.strerror or error}; make the folder writable, or copy "
            "the study and report on the copy"
        ) from error


def _write(study: Study) -> Path:
    from phi3_jax.reporting import figures  # matplotlib only from here on

    write_csv(study, study.folder / "runs.csv")
    found, scores = _arms(study), sections.forecasts(study)
    said = sections.rule(study)
    body = [_head(study, found), said]
    many = len(study.arms) > 1
    if found:
        body.append(sections.arm_sections(study, *found))
    elif many:
        body.append(sections.arm_differences(study))
    for number, (name, runs) in enumerate(() if found else study.arms.items(), 1):
        suffix = f"-{number}" if many else ""
        drawn, left_out = figures.draw(runs, study.folder / "figures", suffix)
        body.append(f"<h2>{markup.text(name[0].upper() + name[1:])}</h2>" if many else "")
        body.append(sections.figure_list(drawn, left_out, what_was_trained(runs)))
        body += [sections.training_note(runs), sections.laws(study, runs, suffix, scores)]
        body += [sections.scores(runs), sections.gain_table(runs)]
    body += [sections.run_tables(study), sections.notes(study)]
    path = study.folder / "report.html"
    files.write_text(path, markup.page(_title(study), body))
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


def _title(study: Study) -> str:
    return str(study.meta.get("title") or study.meta.get("name") or study.folder.resolve().name)


def _head(study: Study, found: tuple[Any, ...] | None = None) -> str:
    """The first screen: what was trained, the question, the answer, and what is missing."""
    parts = [
        f"<h1>{markup.text(_title(study))}</h1>",
        f'<p class="label">{markup.text(what_was_trained(study.runs))}.</p>',
    ]
    asked = rule_question(found[1]["rule"]["arms"]) if found and found[2] else question(study)
    lines = [f"<b>{markup.text(asked)}</b>"] if asked else []
    lines += _arm_answer(study, *found) if found else [markup.text(s) for s in headlines(study)]
    parts.append(f'<div class="headline">{"".join(f"<p>{line}</p>" for line in lines)}</div>')
    if study.missing:
        shown = [markup.text(m[0].upper() + m[1:] + ".") for m in study.missing]
        rest = f"<details><summary>and {len(shown) - 8} more</summary>{markup.items(shown[8:])}</details>"
        parts.append(
            f'<div class="missing"><p>What is missing from this study:</p>{markup.items(shown[:8])}'
            f"{rest if shown[8:] else ''}</div>"
        )
    return "\n".join(parts)


def _arm_answer(study: Study, rows: list[Any], config: dict[str, Any], verdict: Any) -> list[str]:
    """What a study with arms answers: its rule's verdict, or paired differences and the best rates, without one."""
    if verdict:
        word = f"<b>By the rule written before the runs: {markup.text(verdict.word)}.</b>"
        return [word, *map(markup.text, verdict.findings)]
    from phi3_jax.reporting import arms

    lines = [*between(study), *arms.rate_sentences(rows, config.get("arms", {}))]
    finished = f"{sum(run.finished for run in study.runs)} of {len(study.runs)} runs have finished."
    return [markup.text(line) for line in (*lines, finished)]
