"""Figures of the published table: curves, gains, other families, versions, and what a contrast is made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from phi3_jax.family import ROUNDED, TRIO
from phi3_jax.reporting.figures import sheet, size_style
from phi3_jax.scaling import gains, published
from phi3_jax.scaling.published import Benchmark
from phi3_jax.statistics import wilson

FOOTER = "Published scores of the released models (arXiv:2404.14219v4); binomial 95% intervals at public test-set sizes"
GROUPS = {
    "knowledge": "#0072B2",
    "reasoning": "#D55E00",
    "commonsense": "#009E73",
    "mixed": "#7F7F7F",
    "code": "#CC79A7",
}
PARTS = (
    ("compute", "", "#A6CEE3"),
    ("ceiling", "///", "#FFFFFF"),
    ("recipe", "...", "#FDBF6F"),
    ("remainder", "xx", "#BBBBBB"),
)
MARKS = {"knowledge": "o", "reasoning": "s", "commonsense": "D", "mixed": "^", "code": "v"}  # not by colour alone
LINES = ("#0072B2", "#D55E00", "#009E73", "#7F7F7F", "#CC79A7", "#B8860B")


def _size_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(published.SIZES, [ROUNDED[m] for m in TRIO], fontsize=9)
    ax.set_xlim(published.SIZES[0] / 1.25, published.SIZES[-1] * 1.25)


def _group_handles(ax: Axes) -> list:
    return [ax.plot([], [], MARKS[g], color=c, label=g)[0] for g, c in GROUPS.items()]


def curves(rows: Sequence[Benchmark]) -> Figure:
    """Every benchmark against parameters, with Wilson intervals; dashed: the line through mini and medium."""
    figure = sheet(9.6, FOOTER)
    for ax, b in zip(figure.subplots(4, 5).flat, rows, strict=True):
        p = 100 * np.array(b.scores)
        bounds = 100 * np.array([wilson(x * b.n, b.n) for x in b.scores])
        colour = GROUPS[b.group]
        ax.plot(published.SIZES, p, "-", color=colour)
        for x, y, (low, high), m in zip(published.SIZES, p, bounds, TRIO, strict=True):
            ax.errorbar([x], [y], yerr=[[y - low], [high - y]], color=colour, fmt=size_style(m)[1], markersize=5)
        ax.plot(published.SIZES[::2], p[::2], color="#333333", linestyle=(0, (5, 4)), linewidth=0.9)
        ax.set_title(f"{b.name} (n={b.n:,})", loc="left", fontsize=9.5)
        _size_axis(ax)
    for ax in figure.axes[::5]:
        ax.set_ylabel("score (%)")
    for ax in figure.axes[-5:]:
        ax.set_xlabel("parameters")
    figure.legend(
        handles=[figure.axes[0].plot([], [], "-", color=c, label=g)[0] for g, c in GROUPS.items()],
        loc="outside upper left", ncols=5,
    )  # fmt: skip
    return figure


def error_lines(rows: Sequence[Benchmark]) -> Figure:
    """log2 of the error against log of the size, as the report's Figure 3, with 14B; a straight line is a power law."""
    figure = sheet(4.6, FOOTER)
    axes = figure.subplots(1, 2)
    chosen = {"MMLU"}, {"TriviaQA", "MATH", "GSM-8K", "BigBench-Hard", "HellaSwag", "ANLI"}
    for ax, names in zip(axes, chosen, strict=True):
        for k, b in enumerate(b for b in rows if b.name in names):
            error = 100 * (1 - np.array(b.scores))
            bounds = [100 * (1 - np.array(wilson(x * b.n, b.n))) for x in b.scores]
            colour, marker = LINES[k], "osD^vP"[k]
            ax.plot(published.SIZES, error, "-", color=colour, marker=marker, label=b.name)
            for x, y, (high, low) in zip(published.SIZES, error, bounds, strict=True):
                ax.errorbar([x], [y], yerr=[[y - low], [high - y]], color=colour, fmt="none")
        if len(names) == 1:
            b = published.benchmark("MMLU")
            e, n = 100 * (1 - np.array(b.scores)), np.array(published.SIZES)
            slope = np.log(e[1] / e[0]) / np.log(n[1] / n[0])
            ax.plot(n[[0, 2]], e[0] * (n[[0, 2]] / n[0]) ** slope, color="#333333", linestyle=(0, (5, 4)), linewidth=1,
                    label="slope of 3.8B to 7B, carried on")  # fmt: skip
        _size_axis(ax)
        ax.set_yscale("log", base=2)
        ticks = [t for t in (5, 8, 10, 15, 20, 25, 30, 40, 50, 65) if ax.get_ylim()[0] <= t <= ax.get_ylim()[1]]
        ax.set_yticks(ticks, [f"{t}" for t in ticks])
        ax.yaxis.set_minor_locator(NullLocator())
        ax.set_xlabel("parameters")
        ax.set_ylabel("error (%), log scale")
        if len(names) == 1:
            ax.legend(fontsize=8.5, loc="lower left")
        else:
            ax.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def forest(rows: Sequence[Benchmark], scale: str = "points") -> Figure:
    """Second gain minus first per doubling of N and of C, with other families as a band; filled: significant after Holm."""
    figure = sheet(1.6 + 0.27 * len(rows), FOOTER)
    axes = figure.subplots(1, 2, sharey=True)
    order = sorted(rows, key=lambda b: next(c.value for c in gains.contrasts(rows, "points") if c.benchmark == b.name))
    unit = {"points": "points", "logit": "log-odds", "exponent": "exponent of the error"}[scale]
    for ax, per in zip(axes, ("N", "C"), strict=True):
        found = {c.benchmark: c for c in gains.contrasts(rows, scale, per)}
        if scale == "points" and per == "N":
            others = np.array([r["second"] - r["first"] for r in published.families()])
            low, high = np.quantile(others, (0.1, 0.9))
            ax.axvspan(low, high, color="#E6E6E6", zorder=0, label="middle 80% of 22 other families")
        for y, b in enumerate(order):
            c = found[b.name]
            ax.plot(c.interval, [y, y], color="#333333", linewidth=1.4)
            sure = c.holm < 0.05
            face = GROUPS[b.group] if sure else "white"
            ax.plot([c.value], [y], MARKS[b.group], color=GROUPS[b.group], markerfacecolor=face)
        ax.axvline(0, color="#333333", linewidth=1)
        ax.set_xlabel(f"second step minus first, {unit}\nper doubling of {'parameters' if per == 'N' else 'compute'}")
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(order)), [b.name for b in order], fontsize=9)
    handles = _group_handles(axes[0])
    handles += [axes[0].plot([], [], "o", color="#333333", markerfacecolor="white", label="not significant (Holm)")[0]]
    handles += axes[0].get_legend_handles_labels()[0][:1] if scale == "points" else []
    figure.legend(handles=handles, loc="outside upper left", ncols=4, fontsize=8.5)
    return figure


def versions() -> Figure:
    """Gains per doubling in three versions of the table: first step against second."""
    figure = sheet(4.4, FOOTER)
    names = {"v4": "report v4", "azure": "cards, 23 April 2024", "hf": "Hugging Face card, April 2024"}
    for ax, (version, title) in zip(figure.subplots(1, 3, sharex=True, sharey=True), names.items(), strict=True):
        rows = published.benchmarks(version)
        found = gains.contrasts(rows)
        ax.axline((0, 0), slope=1, color="#333333", linewidth=1)
        for b, c in zip(rows, found, strict=True):
            ax.plot([c.first], [c.second], MARKS[b.group], color=GROUPS[b.group])
            if abs(c.value) > 11:
                ax.annotate(b.name, (c.first, c.second), (5, 3), textcoords="offset points", fontsize=8)
        below = sum(c.value < 0 for c in found)
        ax.set_title(f"{title}: {below} of {len(found)} below the line", loc="left", fontsize=9.5)
        ax.set_xlabel("gain 3.8B to 7B\n(points per doubling of parameters)")
    figure.axes[0].set_ylabel("gain 7B to 14B\n(points per doubling of parameters)")
    figure.legend(handles=_group_handles(figure.axes[0]), loc="outside upper left", ncols=5)
    return figure


def decomposition(rows: Sequence[Benchmark]) -> Figure:
    """What each contrast is made of (`gains.decompose`): stacked parts, and the whole with its interval."""
    parts = sorted(gains.decompose(rows), key=lambda d: d.total)
    figure = sheet(1.3 + 0.29 * len(parts), FOOTER)
    ax = figure.subplots()
    for y, d in enumerate(parts):
        left = {1: 0.0, -1: 0.0}
        for name, hatch, colour in PARTS:
            value = getattr(d, name)
            sign = 1 if value >= 0 else -1
            ax.barh(y, value, 0.62, left=left[sign], color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.6)
            left[sign] += value
        ax.plot([d.total - 1.96 * d.stderr, d.total + 1.96 * d.stderr], [y, y], color="#000000", linewidth=1.4)
        ax.plot([d.total], [y], "D", color="#000000", markersize=5)
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set_yticks(range(len(parts)), [d.benchmark for d in parts], fontsize=9)
    ax.set_xlabel("second step minus first (points per doubling of parameters)")
    ax.grid(axis="y", visible=False)
    handles: list[BarContainer | Line2D] = [
        ax.barh([0], [0], color=c, hatch=h, edgecolor="#333333", label=n) for n, h, c in PARTS
    ]
    handles.append(ax.plot([], [], "D", color="#000000", label="whole, with its interval")[0])
    figure.legend(handles=handles, loc="outside upper left", ncols=5, fontsize=8.5)
    return figure


def safety() -> Figure:
    """The rows of the responsible-AI table by size; shares with the interval that 1,000 conversations would give."""
    n = 1000  # the report gives no number
    footer = f"Published scores of the released models (arXiv:2404.14219v4); bars: 95% intervals of {n:,} conversations"
    figure = sheet(4.2, footer)
    left, right = figure.subplots(1, 2)
    for k, row in enumerate(published.safety()):
        ax, colour = (right if row.share else left), LINES[k]
        ax.plot(published.SIZES, row.values, "-", color=colour, marker="osD^v"[k], label=row.name)
        for x, y in zip(published.SIZES, row.values if row.share else (), strict=False):
            low, high = wilson(y * n, n)
            ax.errorbar([x], [y], yerr=[[y - low], [high - y]], color=colour, fmt="none")
    for ax, label in ((left, "mean score, 0 to 4"), (right, "share of conversations")):
        _size_axis(ax)
        ax.set_ylim(bottom=0)
        ax.set_xlabel("parameters")
        ax.set_ylabel(label)
    left.legend(fontsize=8.5, loc="lower left")
    right.legend(fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def same_recipe(rows: Sequence[Benchmark]) -> Figure:
    """How far phi-3-small lies from the curve through mini and medium, which share a recipe, by skill group."""
    figure = sheet(4.6, FOOTER)
    ax = figure.subplots()
    d1, d2 = np.diff(np.log2(published.SIZES))
    y, ticks = 0, []
    for group, colour in GROUPS.items():
        for b in sorted((b for b in rows if b.group == group), key=lambda b: b.name):
            d = next(d for d in gains.decompose(rows) if d.benchmark == b.name)
            off = -(d.recipe + d.remainder) / (1 / d1 + 1 / d2)
            half = 196 * np.sqrt(b.scores[1] * (1 - b.scores[1]) / b.n)
            ax.plot([off - half, off + half], [y, y], color=colour, linewidth=1.4)
            ax.plot([off], [y], MARKS[group], color=colour)
            ticks.append(b.name)
            y += 1
    ax.axvline(0, color="#333333", linewidth=1)
    ax.set_yticks(range(len(ticks)), ticks, fontsize=8)
    ax.set_ylim(len(ticks) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("phi-3-small minus the curve through mini and medium at its compute (points)")
    figure.legend(
        handles=[ax.plot([], [], "o", color=c, label=g)[0] for g, c in GROUPS.items()],
        loc="outside upper left",
        ncols=5,
    )
    return figure
