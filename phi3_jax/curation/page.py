"""The report of a curation: one page, the same bytes for the same result."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax.curation import findings, phases, store, synthetic_page
from phi3_jax.curation.table import CORPUS, DOCUMENT, reasons_of
from phi3_jax.curation.work import ROWS, Work
from phi3_jax.records import files
from phi3_jax.reporting import markup

_SHOWN = 400  # characters of an example
_MOST = 0.5  # a rule that drops more of a source than this is warned of
_PAIRS = 5  # duplicates that are shown with their differences
STYLE = """
.h{display:flex;align-items:flex-end;height:56px;gap:1px;margin:4px 0 2px;width:420px}
.h i{flex:1;background:#0072B2;min-height:0}.h i.out{background:#D55E00}
.ex{font-size:13px;background:#f7f7f5;padding:6px 10px;margin:4px 0;white-space:pre-wrap;overflow-wrap:anywhere}
ins{background:#d9f0e3;text-decoration:none}del{background:#fbe0d3}
"""


def write(work: Work, out: Path, manifest: Mapping[str, Any]) -> Path:
    """Writes `report.html` into the folder of a result."""
    seen = findings.look(work, int(manifest["config"]["seed"]))
    title = f"Curation: {manifest['name']}"
    body = [_head(title, manifest), synthetic_page.section(manifest), _waterfall(manifest), _sources(manifest)]
    body += ["<h2>Rules</h2>", _alone(work, seen, manifest)]
    body += [_step(work, manifest, step, seen) for step in manifest["steps"]]
    body += [_contamination(manifest), _knowledge(manifest), _phases(manifest), _inputs(manifest)]
    path = out / "report.html"
    files.write_text(path, markup.page(title, body, STYLE + synthetic_page.STYLE))
    return path


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """What a reader should look at: rules that drop most of a source, steps that matched nothing."""
    found = []
    for step in manifest["steps"]:
        for source, count in step["by_source"].items():
            read = manifest["sources"][source]["read"]
            if count > _MOST * read:
                found.append(f"{step['step']} drops {count:,} of the {read:,} documents of {source}")
        if (
            not step["documents"]
            and not manifest["notes"].get(step["step"], {}).get("lines")
            and (step["rule"] in CORPUS or DOCUMENT[step["rule"]].checks)
        ):
            found.append(f"{step['step']} matched nothing")
    for name, note in manifest["notes"].items():
        control = note.get("control", {})
        if control and (control["found"] < control["planted"] or control["permuted_found"]):
            met = f"{control['found']} of {control['planted']} planted items found"
            found.append(f"{name}: {met}, and {control['permuted_found']} with permuted words")
    found += phases.warnings(manifest) + synthetic_page.warnings(manifest)
    if manifest["read"]["malformed"]:
        places = ", ".join(manifest["read"]["positions"][:3])
        found.append(f"{manifest['read']['malformed']:,} malformed rows were left out, first at {places}")
    return found


def _head(title: str, manifest: Mapping[str, Any]) -> str:
    total = manifest["counts"]
    share = total["tokens_kept"] / max(1, total["tokens_read"])
    lines = [
        f"{total['kept']:,} of {total['read']:,} documents stay, with {total['tokens_kept']:,} of "
        f"{total['tokens_read']:,} tokens ({share:.1%}); tokens of {manifest['config']['tokenizer']}.",
        f"Train on it with data={manifest['name']} (its folder). Fingerprint {manifest['fingerprint']}.",
    ]
    parts = [f"<h1>{markup.text(title)}</h1>"]
    parts.append(f'<div class="headline">{"".join(f"<p>{markup.text(line)}</p>" for line in lines)}</div>')
    if noted := warnings(manifest):
        shown = markup.items(map(markup.text, noted[:20]))
        more = f"<p>and {len(noted) - 20} more</p>" if len(noted) > 20 else ""
        parts.append(f'<div class="missing"><p>To look at:</p>{shown}{more}</div>')
    return "\n".join(parts)


def _waterfall(manifest: Mapping[str, Any]) -> str:
    total = manifest["counts"]
    left, tokens = total["read"], total["tokens_read"]
    rows = [("", ["read", "", f"{left:,}", "", f"{tokens:,}", ""])]
    for step in manifest["steps"]:
        left, tokens = left - step["documents"], tokens - step["tokens"]
        rows.append(
            ("", [step["step"], f"{step['documents']:,}", f"{left:,}", f"{step['tokens']:,}", f"{tokens:,}",
                  f"{step['documents'] / max(1, left + step['documents']):.1%}"])
        )  # fmt: skip
    changed = total["tokens_kept"] - tokens
    rows.append(("", ["changed in texts that stay", "", f"{left:,}", f"{-changed:,}", f"{total['tokens_kept']:,}", ""]))
    header = ["step", "documents dropped", "left", "tokens dropped", "tokens left", "of those it saw"]
    return "<h2>Step by step</h2>" + markup.table(header, rows)


def _sources(manifest: Mapping[str, Any]) -> str:
    steps = [step for step in manifest["steps"] if step["documents"]]
    header = ["source", "licence", "read", *(step["step"] for step in steps), "kept", "tokens kept", "of its tokens"]
    rows = []
    for name, of in manifest["sources"].items():
        lost = [f"{step['by_source'].get(name, 0):,}" for step in steps]
        share = of["tokens_kept"] / max(1, of["tokens_read"])
        licences = ", ".join(of["licences"])
        kept = [f"{of['kept']:,}", f"{of['tokens_kept']:,}", f"{share:.1%}"]
        rows.append(("", [name, licences, f"{of['read']:,}", *lost, *kept]))
    return "<h2>Sources</h2><p>Documents that each step drops of each source.</p>" + markup.table(header, rows, 2)


def _alone(work: Work, seen: Mapping[str, findings.Seen], manifest: Mapping[str, Any]) -> str:
    first = {step["step"]: step["documents"] for step in manifest["steps"]}
    rows = [
        ("", [step.name, f"{first[step.name]:,}", f"{seen[step.name].would:,}", f"{seen[step.name].alone:,}"])
        for step in work.steps
        if step.name in seen and DOCUMENT[step.rule].checks
    ]
    if not rows:
        return ""
    note = (
        "<p>Every rule measures all documents that the steps before its group left, also those another one drops.</p>"
    )
    return note + markup.table(["rule", "drops first", "would drop", "drops alone"], rows)


def _step(work: Work, manifest: Mapping[str, Any], entry: Mapping[str, Any], seen: Mapping[str, findings.Seen]) -> str:
    step = next(step for step in work.steps if step.name == entry["step"])
    rule = DOCUMENT.get(step.rule) or CORPUS[step.rule]
    parts = [f"<h3>{markup.text(step.name)}</h3><p>{markup.text(rule.doc)}.</p>"]
    values = ", ".join(
        f"{name}={_shown(value)}" for name, value in step.parameters.items() if value not in ("", (), [])
    )
    parts.append(f'<p class="small">{markup.text(values)}</p>' if values else "")
    if entry["reasons"]:
        parts.append(markup.items(f"{markup.text(reason)}: {count:,}" for reason, count in entry["reasons"].items()))
    if step.name in seen:
        found = seen[step.name]
        if found.counts:
            parts.append(
                markup.items(f"{markup.text(name)}: {count:,} replaced" for name, count in found.counts.items())
            )
        parts += [_histogram(step, reason, counts) for reason, counts in found.histograms.items() if counts.sum()]
        near = [(doc, f"{reason} {value:.4g}") for _, doc, reason, value in found.near]
        parts += _examples(work, "Nearest to a limit, kept", near)
        parts += _examples(work, "Dropped", [(doc, f"{reason} {value:.4g}") for doc, reason, value in found.dropped])
    else:
        parts.append(_pairs(work, step.name))
        parts.append(_lines(manifest["notes"].get(step.name, {})))
        parts.append(_scores(manifest["notes"].get(step.name, {}), step))
    return "\n".join(filter(None, parts))


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _histogram(step: Any, reason: str, counts: np.ndarray) -> str:
    check = next(check for check in DOCUMENT[step.rule].checks if check.reason == reason)
    limit = step.parameters[check.limit]
    most = counts.max()
    half = findings.BINS / findings.WIDE
    bars = "".join(
        f'<i class="{"out" if (i >= half) == check.above else ""}" style="height:{100 * n / most:.0f}%"></i>'
        for i, n in enumerate(counts.tolist())
    )
    side = "above" if check.above else "below"
    return (
        f'<div class="h">{bars}</div><p class="small">{markup.text(reason)}: 0 to {findings.WIDE * limit:g} and more; '
        f"dropped {side} {limit:g}</p>"
    )


def _examples(work: Work, title: str, chosen: list[tuple[int, str]]) -> list[str]:
    if not chosen:
        return []
    texts = {doc: text for doc, text in _originals(work, sorted(doc for doc, _ in chosen))}
    shown = []
    for doc, why in chosen:
        identifier, text = texts[doc]
        cut = text[:_SHOWN] + (" ..." if len(text) > _SHOWN else "")
        shown.append(f'<div class="ex"><b>{markup.text(why)}</b> {markup.text(identifier)}\n{markup.text(cut)}</div>')
    return [f"<details><summary>{title} ({len(chosen)})</summary>{''.join(shown)}</details>"]


def _originals(work: Work, docs: list[int]) -> list[tuple[int, tuple[str, str]]]:
    """(number, (id, text as it was read)) of some documents."""
    found = []
    for number in dict.fromkeys(doc // ROWS for doc in docs):
        columns = store.read(work.read_part(number), ["id", "text"])
        for doc in (d for d in docs if d // ROWS == number):
            found.append((doc, (columns["id"][doc % ROWS].as_py(), columns["text"][doc % ROWS].as_py())))
    return found


def _pairs(work: Work, name: str) -> str:
    """The duplicates that are least alike, with what differs."""
    step = next(step for step in work.steps if step.name == name)
    path = work.dropped_file(step)
    if not path.is_file():
        return ""
    columns = {key: value.to_numpy(zero_copy_only=False) for key, value in store.read(path).items()}
    order = np.lexsort((columns["doc"], columns["value"]))[:_PAIRS]
    names = ("doc", "other", "value", "check")
    chosen = [tuple(columns[name][i].item() for name in names) for i in order if columns["other"][i] >= 0]
    if not chosen:
        return ""
    texts = dict(_originals(work, sorted({doc for pair in chosen for doc in pair[:2]})))
    shown = []
    for doc, other, value, check in chosen:
        why = f"{reasons_of(step.rule)[check]} {value:.3f}: {texts[doc][0]} dropped, {texts[other][0]} stays"
        shown.append(f'<div class="ex"><b>{markup.text(why)}</b>\n{_difference(texts[other][1], texts[doc][1])}</div>')
    return f"<details><summary>Least alike of those dropped ({len(shown)})</summary>{''.join(shown)}</details>"


def _lines(note: Mapping[str, Any]) -> str:
    """Lines that were taken out most often."""
    if not note.get("lines"):
        return ""
    rows = [("", [f"{count:,}", line]) for count, line in note["most"]]
    said = f"<p>{note['lines']:,} lines were taken out of {note['cut']:,} documents that stay; most often:</p>"
    return said + markup.table(["times", "line"], rows)


def _scores(note: Mapping[str, Any], step: Any) -> str:
    """Scores under a model, by source: percentiles, and how many lie within the limits."""
    if "scores" not in note:
        return ""
    rows = [
        ("", [name, f"{of['documents']:,}", f"{of['kept']:,}", *(f"{value:.3f}" for value in of["percentiles"])])
        for name, of in note["scores"].items()
    ]
    header = ["source", "documents", "stay", *(f"{point} %" for point in note["points"])]
    limits = f"{step.parameters['least']:g} to {step.parameters['most']:g} stay"
    return f"<p>Bits per byte, percentiles by source; {limits}.</p>" + markup.table(header, rows)


def _difference(kept: str, dropped: str) -> str:
    a, b = kept.split()[:150], dropped.split()[:150]
    parts = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            words = a[i:j] if j - i < 14 else [*a[i : i + 6], "...", *a[j - 6 : j]]
            parts.append(markup.text(" ".join(words)))
            continue
        parts += [f"<del>{markup.text(' '.join(a[i:j]))}</del>"] * (j > i)
        parts += [f"<ins>{markup.text(' '.join(b[k:m]))}</ins>"] * (m > k)
    return " ".join(parts)


def _contamination(manifest: Mapping[str, Any]) -> str:
    """Which benchmarks were met, and whether the search finds what is planted."""
    parts = []
    for name, note in manifest["notes"].items():
        if "contaminated" not in note:
            continue
        control, met = note["control"], note["contaminated"]
        lines = (
            f"{name}, mode {note['mode']}: of {control['planted']} planted items {control['found']} were found, of as many "
            f"with permuted words {control['permuted_found']}.",
            f"{note['too_short']:,} items are too short to be looked for.",
            f"No evidence: {note['shared_ngrams']:,} n-grams of several benchmarks, {note['common_ngrams']:,} of very many "
            "documents.",
        )
        parts.append(markup.items(map(markup.text, lines)))
        rows = [("", [b, f"{n:,}", f"{len(met[b]):,}", ", ".join(met[b][:8])]) for b, n in note["items"].items()]
        parts.append(markup.table(["benchmark", "items", "met in the corpus", "the first"], rows))
    return "<h2>Contamination</h2>" + "".join(parts) if parts else ""


def _knowledge(manifest: Mapping[str, Any]) -> str:
    """Facts of the corpus, what stays at other sizes, and subjects at either end of the order."""
    parts = []
    for name, note in manifest["notes"].items():
        if "budget" not in note:
            continue
        spread = ", ".join(f"{value:g}" for value in note["exposures"])
        lines = (
            f"{name}: {note['facts']:,} facts of {note['bits']:,.0f} bits, in {note['documents_with_facts']:,} documents; "
            f"room for {note['budget']:,.0f} bits.",
            f"A fact is stated so often (5th, 50th and 95th percentile of the facts): {spread}.",
            f"{note['words_without']:,} words are in documents without facts, which stay at any size.",
        )
        parts.append(markup.items(map(markup.text, lines)))
        sizes = [
            ("", [f"{s['parameters']:,}", f"{s['bits']:,.0f}", f"{s['documents']:,}", f"{s['words']:,}"])
            for s in note["sizes"]
        ]
        header = ["parameters", "bits that stay", "documents with facts", "their words"]
        parts.append(
            "<p>What stays for other sizes; each corpus lies within the next.</p>" + markup.table(header, sizes)
        )
        rows = [
            ("", ["stays" if s["stays"] else "dropped", f"{s['cost']:.3f}", f"{s['documents']:,}", s["text"]])
            for s in note["subjects"]
        ]
        header = ["subject", "bits per word", "documents", "the first of them"]
        parts.append("<p>The cheapest, those at the limit, and the dearest.</p>" + markup.table(header, rows))
    return "<h2>Knowledge</h2>" + "".join(parts) if parts else ""


def _phases(manifest: Mapping[str, Any]) -> str:
    """Roles of each phase and how often their text will be read."""
    rows = [("", row) for row in phases.rows(manifest)]
    return "<h2>Phases</h2>" + markup.table([*phases.HEADER], rows, 2) if rows else ""


def _inputs(manifest: Mapping[str, Any]) -> str:
    rows = [("", [name, f"{size:,}", sha]) for name, size, sha in manifest["inputs"][:200]]
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    more = f"<p>and {len(manifest['inputs']) - 200} more</p>" if len(manifest["inputs"]) > 200 else ""
    return (
        "<h2>Input</h2>" + markup.table(["file", "bytes", "sha256"], rows) + more
        + f'<p class="small">Versions: {markup.text(versions)}.</p>'
    )  # fmt: skip
