"""The part of the page on synthetic text: what became of the answers, how varied the texts are, which prompts were sent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from phi3_jax.curation import diversity
from phi3_jax.reporting import markup

STYLE = """
svg.d{width:100%;max-width:1160px;height:auto;display:block;margin:10px 0 2px}
svg.d text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",sans-serif;fill:#333}
"""
WEB = "the web part"
_MANY = 0.05  # share of answers that are dropped from which a reader is warned
_MANY_TEXTS = 5 * diversity.COMMONEST  # of which the share of the ten commonest openings says something
_ALIKE = 0.3  # share of texts that are near duplicates of one another, likewise
_LOOKS = (  # Okabe and Ito's colours, each with a marker of its own
    ("#0072B2", "circle"), ("#D55E00", "square"), ("#009E73", "diamond"), ("#CC79A7", "triangle"), ("#B8860B", "cross"),
    ("#56B4E9", "circle"), ("#E69F00", "square"),
)  # fmt: skip
_GREY = ("#666666", "none")
WIDE, HIGH, LEFT, TOP, GAP = 220, 170, 46, 58, 70  # of a panel, and around it
Kinds = Sequence[tuple[str, Mapping[str, Any]]]


def lines(manifest: Mapping[str, Any]) -> list[str]:
    """What a command prints before its steps: who wrote, what became of the answers, how varied the texts are."""
    if not (found := manifest.get("synthetic")):
        return []
    said = [f"{'written by':20} {found['model']}, {_tokens(found)}"]
    for name, of in found["templates"].items():
        outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in of["outcomes"].items() if count)
        varied = of["diversity"]
        more = f"; near duplicates {varied['near']:.0%}" if "near" in varied else ""
        said.append(f"{name:20} {outcomes}; {of['kept']:,} stay{more}")
    return said


def warnings(manifest: Mapping[str, Any]) -> list[str]:
    """What a reader of synthetic text should look at."""
    if not (found := manifest.get("synthetic")):
        return []
    said = []
    for name, of in found["templates"].items():
        total = sum(of["outcomes"].values())
        for outcome, count in of["outcomes"].items():
            if outcome != "written" and count > _MANY * total:
                said.append(f"{count:,} of {total:,} answers to {name} are {outcome.replace('_', ' ')}")
        if of["diversity"].get("near", 0.0) > _ALIKE:
            said.append(f"{of['diversity']['near']:.0%} of the texts of {name} are half alike or more; widen its axes")
        if total > of["combinations"]:
            said.append(
                f"{name} has {of['combinations']:,} combinations for {total:,} requests; they are asked for again"
            )
    rules = {step["rule"] for step in manifest["steps"]}
    if "decontaminate" not in rules:
        said.append("no benchmarks=FOLDER: nothing was compared with items of benchmarks")
    if not found["licence"]:
        said.append("no licence=NAME: no document says under which terms the model's text may be used")
    return said


def _tokens(found: Mapping[str, Any]) -> str:
    sampling = ", ".join(f"{name} {value:g}" for name, value in found["sampling"].items())
    return f"{found['tokens']['read']:,} tokens read and {found['tokens']['written']:,} written; {sampling}"


def section(manifest: Mapping[str, Any]) -> str:
    """The part of the page; "" of a curation of pages."""
    if not (found := manifest.get("synthetic")):
        return ""
    kinds = [(name, of["diversity"]) for name, of in found["templates"].items()]
    if found["web"]:
        kinds.append((WEB, found["web"]))
    parts = [
        "<h2>Synthetic text</h2>",
        f"<p>Written by {markup.text(found['model'])}: {markup.text(_tokens(found))}.</p>",
    ]
    parts += [_outcomes(found), "<h3>Diversity</h3>", _figure(kinds), _table(found, kinds), _prompts(found)]
    return "\n".join(parts)


def _outcomes(found: Mapping[str, Any]) -> str:
    first = next(iter(found["templates"].values()))
    header = [
        "template",
        "hash",
        "requests",
        *(name.replace("_", " ") for name in first["outcomes"]),
        "stay",
        "combinations",
    ]
    rows = [
        ("", [f"{name} {of['version']}", of["hash"], f"{sum(of['outcomes'].values()):,}",
              *(f"{count:,}" for count in of["outcomes"].values()), f"{of['kept']:,}", f"{of['combinations']:,}"])
        for name, of in found["templates"].items()
    ]  # fmt: skip
    note = (
        "<p>An answer that is truncated (it reached max_tokens), empty, refused, or whose prompt leaves no room in the "
        "context is no document. Those written go through the steps below.</p>"
    )
    return note + markup.table(header, rows, 2)


def _table(found: Mapping[str, Any], kinds: Kinds) -> str:
    able = [(name, of) for name, of in kinds if "near" in of]
    if not able:
        return "<p>Fewer than two texts of each template stay; nothing can be compared.</p>"
    length = diversity.common_length([of for _, of in able])
    header = ["texts of", "looked at", *(f"new {n}-grams" for n in diversity.ORDERS), "ten commonest openings",
              "the commonest", "compressed to", "similarity", "half alike", "before the steps"]  # fmt: skip
    rows = []
    for name, of in able:
        before = found["templates"].get(name, {}).get("diversity_before", {})
        new = [diversity.at(of, n, length) for n in diversity.ORDERS]
        opening, share = of["opening"]
        rows.append(
            ("", [name, f"{of['documents']:,}", *(markup.decimal(value, digits=2) for value in new),
                  f"{of['openings']:.0%}" if of["documents"] >= _MANY_TEXTS else "–", f"{opening} ({share:.0%})",
                  f"{of['compressed']:.0%}", f"{of['similar']:.2f}",
                  f"{of['near']:.0%}", f"{before['near']:.0%}" if "near" in before else "–"])
        )  # fmt: skip
    note = (
        f"<p>New n-grams: share of distinct ones in the first {length:,} words that are read, the most that all have. "
        f"Similarity: mean, over at most {diversity.SAMPLE} texts, of the Jaccard similarity of word 3-grams with the text "
        f"most like it; half alike: it reaches {diversity.LIKE:g}, of the texts that stay and of all that were written.</p>"
    )
    return note + markup.table(header, rows)


def _prompts(found: Mapping[str, Any]) -> str:
    shown = "".join(
        f'<div class="ex"><b>{markup.text(name)}, version {of["version"]}, {of["hash"]}</b>\n'
        f"{markup.text(of['prompt'])}</div>"
        for name, of in found["templates"].items()
    )
    return f"<details><summary>Templates ({len(found['templates'])})</summary>{shown}</details>"


# ------------------------------------------------------------------------------------------------ the figure


def _figure(kinds: Kinds) -> str:
    """Panels for n = 1, 2, 3 (share of new n-grams against words read), and one for the most similar text."""
    able = [(name, of, _GREY if name == WEB else _LOOKS[i % len(_LOOKS)]) for i, (name, of) in enumerate(kinds)]
    able = [entry for entry in able if "near" in entry[1]]
    if not able:
        return ""
    width = LEFT + 4 * WIDE + 3 * GAP + 14
    parts = [f'<svg class="d" viewBox="0 0 {width} {TOP + HIGH + 44}" role="img" aria-label="Diversity by template">']
    x = LEFT
    for name, _, look in able:
        parts += [_dash(x, 14, x + 26, 14, look), _mark(x + 13, 14, look), _text(x + 32, 18, name)]
        x += 52 + 7 * len(name)
    spans = [[w for w, _ in of["curve"][str(n)]] for _, of, _ in able for n in diversity.ORDERS if of["curve"][str(n)]]
    most, least = max(map(max, spans), default=2), min(map(min, spans), default=1)
    least = min(least, most / 2)
    for panel, n in enumerate(diversity.ORDERS):
        left = LEFT + panel * (WIDE + GAP)
        across = lambda w, left=left: left + WIDE * math.log(w / least) / math.log(most / least)  # noqa: E731
        ticks = [(across(w), _short(w)) for w in _ticks(least, most)]
        parts.append(_axes(left, f"new {n}-grams", ticks, "words read"))
        for _, of, look in able:
            parts.append(_line([(across(w), _down(share)) for w, share in of["curve"][str(n)]], look))
    left = LEFT + 3 * (WIDE + GAP)
    ticks = [(left + WIDE * value, f"{value:g}") for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts.append(_axes(left, "share of texts", ticks, "similarity with the nearest text"))
    for _, of, look in able:
        total = max(1, sum(of["histogram"]))
        points = [(left + WIDE * (i + 0.5) / diversity.BINS, _down(c / total)) for i, c in enumerate(of["histogram"])]
        parts.append(_line(points, look))
    return "".join([*parts, "</svg>"])


def _down(share: float) -> float:
    return TOP + HIGH * (1 - share)


def _ticks(least: float, most: float) -> list[float]:
    found = [m * 10.0**p for p in range(1, 6) for m in (1, 3) if least <= m * 10**p <= most]
    return found if len(found) > 1 else [least, most]


def _short(words: float) -> str:
    return f"{words / 1000:g}k" if words >= 1000 and words % 100 == 0 else f"{words:.0f}"


def _axes(left: float, title: str, ticks: Sequence[tuple[float, str]], label: str) -> str:
    parts = [f'<text x="{left}" y="{TOP - 12}" style="font-weight:600">{markup.text(title)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _down(share)
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + WIDE}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(_text(left - 8, y + 4, f"{share:g}", "end"))
    bottom = TOP + HIGH
    parts.append(f'<line x1="{left}" y1="{bottom}" x2="{left + WIDE}" y2="{bottom}" stroke="#555"/>')
    for x, text in ticks:
        parts.append(f'<line x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 4}" stroke="#555"/>')
        parts.append(_text(x, bottom + 17, text, "middle"))
    parts.append(_text(left + WIDE / 2, bottom + 36, label, "middle"))
    return "".join(parts)


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{markup.text(text)}</text>'


def _dash(x1: float, y1: float, x2: float, y2: float, look: tuple[str, str]) -> str:
    dash = ' stroke-dasharray="5 4"' if look == _GREY else ""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{look[0]}" stroke-width="2"{dash}/>'


def _line(points: Sequence[tuple[float, float]], look: tuple[str, str]) -> str:
    shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if look == _GREY else ""
    line = f'<polyline points="{shown}" fill="none" stroke="{look[0]}" stroke-width="2"{dash}/>'
    return line + "".join(_mark(x, y, look) for x, y in points)


def _mark(x: float, y: float, look: tuple[str, str]) -> str:
    colour, kind = look
    if kind == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
    shape = {
        "square": ((-3, -3), (3, -3), (3, 3), (-3, 3)), "diamond": ((0, -4.5), (4.5, 0), (0, 4.5), (-4.5, 0)),
        "triangle": ((0, -4.5), (4, 3), (-4, 3)), "cross": ((-3, -3), (3, 3), (0, 0), (-3, 3), (3, -3), (0, 0)),
    }.get(kind)  # fmt: skip
    if shape is None:
        return ""
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in shape)
    return f'<polygon points="{points}" fill="{colour}" stroke="{colour}"/>'
