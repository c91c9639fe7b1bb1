"""Figures and sections of a study that compares corpora or recipes: what `scaling.causal` finds, drawn and tabled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from phi3_jax import statistics
from phi3_jax.errors import UserError
from phi3_jax.family import MEMBERS
from phi3_jax.reporting.figures import STYLE, Drawn, depth_floor, save, sheet, size_style
from phi3_jax.scaling import causal, curated, regime, seeing
from phi3_jax.scaling.causal import EXACT, OWN, UNIVERSE, Row, interval
from phi3_jax.statistics import Estimate
from phi3_jax.units import human_count

ARM_STYLE = (("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "D"), ("#000000", ":", "^"))
ARM_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
NAMES = {
    UNIVERSE: "Recall of the whole universe of facts",
    OWN: "Recall of the facts in the corpus",
    EXACT: "Reasoning: exact rows",
    "reasoning/all/accuracy": "Reasoning: outputs right",
    "reasoning/gap3/accuracy": "Reasoning: outputs right, gap 3",
}


def named(rows: Sequence[Row], endpoint: str) -> str:
    """What an endpoint is called; recall of runs that an older scorer counted was teacher-forced, and is called so."""
    name = NAMES.get(endpoint, endpoint)
    forced = endpoint in (UNIVERSE, OWN) and any(float(row.record.get("scorer") or 1) < 2 for row in rows)
    return f"{name}, teacher-forced" if forced else name


def _bar(ax: Axes, x: float, e: Estimate, colour: str, marker: str, **more: Any) -> None:
    """A dot with its interval, where there is one."""
    if e.known:
        ax.errorbar(
            [x], [e.value], yerr=[[e.value - e.low], [e.high - e.value]], color=colour, fmt="none", linewidth=1.3
        )
    ax.plot([x], [e.value], marker, color=colour, **more)


def _sizes(ax: Axes, sizes: Mapping[str, float]) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    # Sizes in between stand lower, so that labels do not meet.
    names = [f"{m}\n{human_count(n)}" if m in MEMBERS else f"\n\n{human_count(n)}" for m, n in sizes.items()]
    ax.set_xticks(list(sizes.values()), names, fontsize=9)
    ax.set_xlim(min(sizes.values()) / 1.25, max(sizes.values()) * 1.25)
    ax.set_xlabel("non-embedding parameters")


def _curve(ax: Axes, rows: Sequence[Row], arm: str, endpoint: str, style: tuple[str, str, str], label: str) -> None:
    colour, line, marker = style
    table, sizes = causal.scores(rows, arm, endpoint), causal.sizes(rows, arm)
    means = {m: causal.mean(by_seed) for m, by_seed in table.items()}
    ax.plot(
        [sizes[m] for m in table], [e.value for e in means.values()], line, color=colour, marker=marker, label=label
    )
    for m, e in means.items():
        _bar(ax, sizes[m], e, colour, marker)
        if e.n > 1:
            ax.plot([sizes[m]] * e.n, list(table[m].values()), ".", color=colour, alpha=0.45, markersize=4, zorder=1)


def curves(rows: Sequence[Row], pair: Sequence[str], footer: str, sizes_of: str = "") -> Figure:
    """Recall of the universe and of the corpus, and exact rows, against size, in two arms (or more)."""
    figure = sheet(4.3, footer)
    axes = figure.subplots(1, 3)
    for ax, endpoint in zip(axes, (UNIVERSE, OWN, EXACT), strict=True):
        for style, arm in zip(ARM_STYLE, pair, strict=False):
            _curve(ax, rows, arm, endpoint, style, arm)
        ax.set_title(named(rows, endpoint).replace(", ", ",\n"), loc="left", fontsize=10)
        depth_floor(ax, endpoint)
        ax.set_ylabel("values recalled (%)" if endpoint != EXACT else "items with all outputs right (%)")
        ax.set_ylim(0, 104)
        _sizes(ax, causal.sizes(rows, sizes_of or pair[0]))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, [f"corpus: {label}" for label in labels], loc="outside upper left", ncols=4)
    return figure


def by_modality(rows: Sequence[Row], rule: Mapping[str, Any], footer: str) -> Figure | None:
    """Scores against size of items that are read and seen, of rising difficulty; None while an arm of them is missing."""
    arms = [arm for arm in rule["arms"] if any(row.arm == arm for row in rows)]
    ends = [head for head, end in seeing.SHOWN.items() if any(end in row.scores for row in rows)]
    ends = [head for head in ends if head in ("scenes", "bars", "1 step", "3 steps", "whole sums")]
    if not arms or not ends:
        return None
    figure = sheet(3.6, footer)
    axes = figure.subplots(1, len(ends), squeeze=False, sharey=True)[0]
    sizes = causal.sizes(rows, arms[0])
    for ax, head in zip(axes, ends, strict=True):
        for style, arm in zip(ARM_STYLE, arms, strict=False):
            _curve(ax, rows, arm, seeing.SHOWN[head], style, arm)
        blind = seeing.floor(rows, rule, seeing.SHOWN[head])
        if blind:
            ax.axhline(
                100 * float(np.mean(list(blind.values()))), color="#555555", linestyle=":", label=rule["floor"][0]
            )
        ax.set_title(head, loc="left", fontsize=10)
        ax.set_ylim(0, 104)
        _sizes(ax, sizes)
    axes[0].set_ylabel("right (%)")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure


def by_threshold(rows: Sequence[Row], config: Mapping[str, Any], footer: str) -> Figure | None:
    """Composite, recall and arithmetic against the share of the bits of facts that is kept, by size; None without a run."""
    rule, runs = config["curated"], curated.block(rows, config).runs
    ends = curated.composite(rule)
    panels: dict[str, Callable[[regime.Run], float]] = {
        "Composite": lambda run: curated.clipped(run).utility(ends),
        "Recall (share of all bits)": lambda run: run.score(regime.RECALL),
        "Arithmetic (loss)": lambda run: run.score(regime.LOSS),
    }
    if not runs:
        return None
    figure = sheet(4.0, footer)
    axes = figure.subplots(1, len(panels))
    members = dict.fromkeys(run.member for run in sorted(runs, key=lambda run: run.size))
    for ax, (title, value) in zip(axes, panels.items(), strict=True):
        for member in members:
            colour, marker = size_style(member)
            for arms, line, filled in ((rule["filter"], "-", colour), (rule["random"], ":", "white")):
                cells: dict[float, list[float]] = {}
                for run in sorted(runs, key=lambda run: run.f):
                    if (run.member, run.arm in arms) == (member, True):
                        cells.setdefault(100 * run.f, []).append(value(run))
                means = [statistics.over_seeds(of) for of in cells.values()]
                label = member if line == "-" else f"{member}, random"
                shown: dict[str, Any] = dict(
                    color=colour, marker=marker, markerfacecolor=filled, label=label if cells else ""
                )
                ax.plot(list(cells), [e.value for e in means], line, **shown)
                for x, e in zip(cells, means, strict=True):
                    _bar(ax, x, e, colour, marker, markerfacecolor=filled)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("bits of facts that are kept (%)")
    allowed = sorted({(100 * run.f, 100 * run.kept) for run in runs if run.arm in rule["filter"]})
    axes[1].plot([f for f, _ in allowed], [kept for _, kept in allowed], color="#555555", linewidth=1)
    axes[0].set_ylabel("points")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=6)
    return figure


def effects(rows: Sequence[Row], pair: tuple[str, str], footer: str) -> Figure | None:
    """Gains per doubling in each arm, and the interaction: points on the left, log-odds on the right."""
    ends = [e for e in (UNIVERSE, OWN, EXACT) if any(e in row.scores for row in rows)]
    figure = sheet(1.5 + 0.95 * len(ends), footer)
    axes = figure.subplots(1, 4, gridspec_kw={"width_ratios": [1.25, 1, 1.25, 1]})
    try:
        for k, scale in enumerate(("points", "logit")):
            left, right = axes[2 * k], axes[2 * k + 1]
            for y, end in enumerate(ends):
                for i, arm in enumerate(pair):
                    colour = ARM_STYLE[i][0]
                    found = causal.steps(rows, arm, end, scale)
                    for values, marker, shift in ((found.first, "o", -0.27), (found.second, "s", -0.12)):
                        _across(left, y + shift + 0.39 * i, causal.mean(values), colour, marker)
                _across(right, y, causal.interaction(rows, pair, end, scale), "#000000", "D")
            unit = "points" if scale == "points" else "log-odds"
            left.set_xlabel(f"gain per doubling ({unit})")
            right.set_xlabel(f"interaction ({unit})")
            for ax in (left, right):
                ax.axvline(0, color="#333333", linewidth=1)
                ax.set_ylim(len(ends) - 0.5, -0.5)
                ax.set_yticks(range(len(ends)), [""] * len(ends))
                ax.grid(axis="y", visible=False)
                for y in range(1, len(ends)):
                    ax.axhline(y - 0.5, color="#BBBBBB", linewidth=0.8)
    except UserError:  # no seed has the three sizes yet
        return None
    axes[0].set_yticks(
        range(len(ends)),
        [named(rows, e).replace(" of the ", "\nof the ").replace(": ", ":\n") for e in ends],
        fontsize=9,
    )
    handles = [
        axes[0].plot([], [], marker, color=ARM_STYLE[i][0], label=f"{arm}: {step}")[0]
        for i, arm in enumerate(pair)
        for marker, step in (("o", "mini to small"), ("s", "small to medium"))
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure


def _across(ax: Axes, y: float, e: Estimate, colour: str, marker: str) -> None:
    """A horizontal interval; hollow where it includes zero or there is none."""
    sure = bool(e.sign)
    if e.known:
        ax.plot([e.low, e.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    ax.plot([e.value], [y], marker, color=colour, markerfacecolor=colour if sure else "white", markersize=6.5)


def mixture(best: Mapping[str, causal.BestShare], split: Mapping[str, causal.Ceiling], footer: str) -> Figure | None:
    """Composite against the share of knowledge for each size, and what loosening adds, split in two."""
    if not best or not split:
        return None
    figure = sheet(4.2, footer)
    left, right = figure.subplots(1, 2)
    for member, found in best.items():
        colour, marker = size_style(member)
        left.plot(found.shares, [e.value for e in found.composite], color=colour, marker=marker, label=member)
        for x, e in zip(found.shares, found.composite, strict=True):
            _bar(left, x, e, colour, marker)
        peak = found.shares.index(found.best)
        left.plot([found.best], [found.composite[peak].value], "o", color=colour, markersize=13, fillstyle="none")
    left.set_xlabel("share of tokens that are knowledge")
    left.set_ylabel("composite (%): mean of recall\nof the universe and exact rows")
    left.set_ylim(0, 100)
    left.set_title("The best mixture of each size (ringed)", loc="left")
    left.legend(loc="lower right")
    places = np.arange(len(split))
    for name, hatch, shade in (("coverage", "", "#A6CEE3"), ("competition", "///", "#FDBF6F")):
        values = [getattr(c, name).value for c in split.values()]
        right.bar(places, values, 0.5, color=shade, edgecolor="#333333", hatch=hatch, label=name)
    for i, c in enumerate(split.values()):
        _bar(right, i, c.total, "#000000", "D")
    right.plot([], [], "D", color="#000000", label="total, with its interval")
    right.axhline(0, color="#333333", linewidth=1)
    right.set_xticks(places, list(split))
    right.set_ylabel("recall of the universe,\nloose minus filtered (points)")
    right.set_title("What putting the facts back brings", loc="left")
    right.legend(loc="upper left")
    return figure


def controls(rows: Sequence[Row], footer: str) -> Figure | None:
    """Every arm of the three sizes: recall of its own facts and exact rows, one dot per size."""
    arms = [a for a in dict.fromkeys(row.arm for row in rows) if not a.startswith("width")]
    if len(arms) < 3 or not any({OWN, EXACT} & row.scores.keys() for row in rows):
        return None
    figure = sheet(1.3 + 0.36 * len(arms), footer)
    axes = figure.subplots(1, 2, sharey=True)
    for ax, endpoint in zip(axes, (OWN, EXACT), strict=True):
        for y, arm in enumerate(arms):
            try:
                table = causal.scores(rows, arm, endpoint)
            except UserError:  # facts alone have no reasoning worth drawing, and the reverse
                continue
            for member, by_seed in table.items():
                colour, marker = size_style(member)
                e = causal.mean(by_seed)
                if e.known:
                    ax.plot([e.low, e.high], [y, y], color=colour, linewidth=1.2)
                ax.plot([e.value], [y], marker, color=colour, markersize=7)
        ax.set_title(named(rows, endpoint).replace(", ", ",\n"), loc="left")
        ax.set_xlabel("right (%)")
        ax.set_xlim(-3, 103)
    axes[0].set_yticks(
        range(len(arms)), [f"{a} ({len({r.seed for r in rows if r.arm == a})})" for a in arms], fontsize=9
    )
    axes[0].set_ylim(len(arms) - 0.5, -0.5)
    axes[0].set_ylabel("arm (seeds)")
    drawn = dict.fromkeys(row.member for row in sorted(rows, key=lambda row: row.size) if row.arm in arms)
    handles = [axes[0].plot([], [], size_style(m)[1], color=size_style(m)[0], label=m)[0] for m in drawn]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def widths(rows: Sequence[Row], footer: str) -> Figure | None:
    """Six widths at one depth: the same three scores in the two corpora."""
    pair = [arm for arm in ("width_filtered", "width_loose") if any(row.arm == arm for row in rows)]
    if len(pair) < 2:
        return None
    return curves(rows, pair, footer, max(pair, key=lambda arm: len(causal.sizes(rows, arm))))


def losses_of_text(rows: Sequence[Row]) -> list[str]:
    """The endpoints that are losses of held-out text, in nats a token."""
    found = dict.fromkeys(
        key for row in rows for key in row.scores if key.startswith("text/") and key.endswith("/loss")
    )
    return sorted(found)


def compute(rows: Sequence[Row], footer: str) -> Figure | None:
    """Loss of each held-out text against the compute of a run, a colour an arm: means over seeds."""
    ends, names = losses_of_text(rows)[:6], list(dict.fromkeys(row.arm for row in rows))
    if not ends or len(names) < 2:
        return None
    figure = sheet(3.4 * -(-len(ends) // 2) + 0.5, footer)
    axes = figure.subplots(-(-len(ends) // 2), 2, squeeze=False).ravel()
    for ax in axes[len(ends) :]:
        ax.set_visible(False)
    for ax, end in zip(axes, ends, strict=False):
        for i, arm in enumerate(names):
            colour = ARM_COLOURS[i % len(ARM_COLOURS)]
            points: dict[tuple[str, float], list[float]] = {}
            for row in rows:
                if row.arm == arm and end in row.scores and row.record.get("flops"):
                    points.setdefault((row.member, float(row.record["flops"])), []).append(row.scores[end])
            for member in dict.fromkeys(member for member, _ in points):
                line = sorted((flops, float(np.mean(v))) for (m, flops), v in points.items() if m == member)
                style = dict(color=colour, linewidth=1.2, marker=size_style(member)[1], markersize=6)
                ax.plot([x for x, _ in line], [y for _, y in line], label=arm, **style)
        ax.set_xscale("log")
        ax.set_title(end.split("/")[1], loc="left")
        ax.set_ylabel("loss (nats per token)")
        ax.set_xlabel("training compute (FLOPs)")
    shown = {arm: Line2D([], [], color=ARM_COLOURS[i % len(ARM_COLOURS)]) for i, arm in enumerate(names)}
    members = dict.fromkeys(row.member for row in sorted(rows, key=lambda row: row.size))
    shown |= {m: Line2D([], [], color="#444444", linestyle="", marker=size_style(m)[1]) for m in members}
    figure.legend(list(shown.values()), list(shown), loc="outside upper left", ncols=min(len(shown), 8))
    return figure


def frequencies(rows: Sequence[Row], footer: str) -> Figure | None:
    """Recall against how often a fact is seen, for each size, and the frequency that half recall needs."""
    here = [row for row in rows if any(key.endswith("recall_by_frequency") for key in row.scores)]
    if not here:
        return None
    figure = sheet(4.0, footer)
    ax, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.6, 1]})
    for row in sorted(here, key=lambda row: row.size):
        points = sorted(
            (int(key.split("/")[1].removeprefix("group ")), 100 * v)
            for key, v in row.scores.items()
            if key.endswith("recall_by_frequency")
        )
        colour, marker = size_style(row.member)
        ax.plot(
            [g**-1.5 for g, _ in points], [v for _, v in points], marker, color=colour, markersize=4, label=row.member
        )
    ax.set_xscale("log")
    ax.set_xlabel("frequency of a fact, relative to the commonest group")
    ax.set_ylabel("values recalled (%)")
    ax.axhline(50, color="#333333", linestyle=(0, (6, 3)), linewidth=1.1)
    ax.legend(loc="upper left")
    sizes = causal.sizes(rows, here[0].arm)
    for member, e in causal.frequency_thresholds(rows, here[0].arm).items():
        _bar(right, sizes[member], e, *size_style(member))
    _sizes(right, sizes)
    right.set_ylabel("log2 of the frequency\nthat half recall needs")
    return figure


@dataclasses.dataclass(frozen=True)
class Rates:
    """Final losses of one size under one parametrisation by peak learning rate, lowest rate first."""

    mup: bool
    member: str
    size: float
    points: list[tuple[float, Estimate]]

    @property
    def best(self) -> tuple[float, Estimate]:
        return min(self.points, key=lambda p: p[1].value)

    @property
    def edge(self) -> str:
        """ "lowest" or "highest" where the best rate is the grid's last, so that a better one may lie beyond; else ""."""
        if len(self.points) < 2 or self.best not in (self.points[0], self.points[-1]):
            return ""
        return "lowest" if self.best == self.points[0] else "highest"


def tried_rates(rows: Sequence[Row], arms: Mapping[str, Mapping[str, Any]]) -> list[Rates]:
    """Every size under each parametrisation of a study of learning rates; [] of fewer than three rates."""
    tried = {name: arm for name, arm in arms.items() if arm.get("peak_lr") and any(row.arm == name for row in rows)}
    out = []
    for mup in sorted({bool(arm.get("mup", True)) for arm in tried.values()} if len(tried) > 2 else (), reverse=True):
        chosen = {name: arm["peak_lr"] for name, arm in tried.items() if bool(arm.get("mup", True)) == mup}
        for member, size in causal.sizes(rows, next(iter(chosen))).items():
            points = [
                (rate, causal.mean(t)) for name, rate in chosen.items() if (t := training_loss(rows, name, member))
            ]
            if points:
                out.append(Rates(mup, member, size, sorted(points, key=lambda p: p[0])))
    return out


def rate_sentences(rows: Sequence[Row], arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The best rate of each size; one at the edge of the grid is called that, for it is not known to be the best."""
    found, out = tried_rates(rows, arms), []
    for mup in dict.fromkeys(r.mup for r in found):
        here = [r for r in found if r.mup == mup]
        best = ", ".join(f"{r.member} {r.best[0]:g}{f' (the {r.edge} tried)' if r.edge else ''}" for r in here)
        text = f"Best learning rate tried under {'muP' if mup else 'the standard parametrisation'}: {best}."
        if edges := [r.member for r in here if r.edge]:
            text += f" At the edge of the grid for {', '.join(edges)}: a better rate may lie beyond it."
        out.append(text)
    return out


def rates(rows: Sequence[Row], arms: Mapping[str, Mapping[str, Any]], footer: str) -> Figure | None:
    """Final loss against the peak learning rate, a line per size; a panel a parametrisation. Ringed: the best rate."""
    found = tried_rates(rows, arms)
    if not found:
        return None
    panels = list(dict.fromkeys(r.mup for r in found))
    figure = sheet(4.2, footer)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for ax, mup in zip(axes, panels, strict=True):
        here = [r for r in found if r.mup == mup]
        for r in here:
            colour, marker = size_style(r.member)
            ax.plot(
                [x for x, _ in r.points], [e.value for _, e in r.points], color=colour, marker=marker,
                label=f"{r.member} ({human_count(r.size)})",
            )  # fmt: skip
            for x, e in r.points:
                _bar(ax, x, e, colour, marker)
            ax.plot([r.best[0]], [r.best[1].value], "o", color=colour, markersize=13, fillstyle="none",
                    linestyle="none", markeredgewidth=1.0 if r.edge else 2.0)  # fmt: skip
        ticks = sorted({x for r in here for x, _ in r.points})
        ax.set_xscale("log", base=2)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.set_xlabel("peak learning rate")
        ax.set_title("muP" if mup else "standard parametrisation", loc="left")
    axes[0].set_ylabel("loss (nats): mean of facts and reasoning")
    axes[0].legend(loc="upper center")
    return figure


def training_loss(rows: Sequence[Row], arm: str, member: str) -> dict[int, float]:
    """{seed: mean of the two domains' final losses in nats}, as training weighs them."""
    ends = ("knowledge/corpus/nll", "reasoning/all/nll")
    here = [row for row in rows if (row.arm, row.member) == (arm, member) and all(e in row.scores for e in ends)]
    return {row.seed: sum(row.scores[e] for e in ends) / 2 for row in here}


FIGURES: tuple[tuple[str, str, str], ...] = (
    ("curves", "Scores against size in the two corpora",
     "Bars are 95% intervals over seeds, small dots single seeds. `filtered` keeps half of the facts, so its recall of the "
     "universe cannot pass one half."),
    ("effects", "Gains per doubling, and the interaction that the rule reads",
     "Interaction: (second gain minus first) in the loose corpus minus the same in the filtered one. Hollow: the 95% "
     "interval includes 0, or there is one seed."),
    ("mixture", "The best share of knowledge, and what the lifted ceiling explains",
     "Coverage: what the added facts bring if they are recalled as well as the filtered corpus's own. Competition: what "
     "is lost because a fuller corpus is recalled less well. A ring at the first or last share tried says only that the "
     "best one may lie beyond."),
    ("compute", "Loss of held-out text against compute, by arm",
     "Every arm is scored on the same held-out documents. A line joins the budgets of one size, each a mean over "
     "seeds."),
    ("controls", "All arms",
     "One dot per size, with 95% intervals where an arm has several seeds (their number is in brackets)."),
    ("widths", "Six widths at one depth", "The same two corpora where nothing but the width differs between sizes."),
    ("rates", "Learning rate",
     "Ringed: the best rate of each size that was tried, thinly where it is the last of the grid: a better one may lie "
     "beyond. A rate transfers where the rings share one column inside the grid."),
    ("frequencies", "Which frequency a size needs", "Facts seen with power-law frequency, in 100 groups."),
    ("thresholds", "Which share of the facts is best for a size",
     "Each size against the share of the bits of all facts that its corpus keeps; what is not kept is arithmetic. Filled: "
     "the filter; hollow: random countries. Grey: the recall that a share allows. Dots are means over seeds, with 95% "
     "intervals where there are several."),
    ("seeing", "Does seeing improve with size like reading?",
     "The same items as text and as pictures, easiest on the left. Dotted: a model that neither reads nor sees the "
     "content. Dots are means over seeds, with 95% intervals where there are several, and small dots single seeds."),
)  # fmt: skip


def draw(
    folder: Path, rows: Sequence[Row], config: Mapping[str, Any], verdict: causal.Verdict | None, footer: str
) -> list[Drawn]:
    """Draws what the runs allow into `folder` as SVG and PNG; without a verdict what needs none."""
    folder.mkdir(parents=True, exist_ok=True)
    make: dict[str, Callable[[], Figure | None]] = {
        "compute": lambda: compute(rows, footer),
        "controls": lambda: controls(rows, footer),
        "widths": lambda: widths(rows, footer),
        "rates": lambda: rates(rows, config.get("arms", {}), footer),
        "frequencies": lambda: frequencies(rows, footer),
        "thresholds": lambda: by_threshold(rows, config, footer) if config.get("curated") else None,
        "seeing": lambda: by_modality(rows, config["seeing"], footer) if config.get("seeing") else None,
    }
    if verdict:
        pair = tuple(config["rule"]["arms"])
        split = causal.ceiling(rows, pair, tuple(config["arms"][arm]["facts"] / config["universe"] for arm in pair))
        make |= {
            "curves": lambda: curves(rows, pair, footer),
            "effects": lambda: effects(rows, pair, footer),
            "mixture": lambda: mixture(verdict.best, split, footer),
        }
    drawn = []
    with rc_context(STYLE):
        for name, title, caption in FIGURES:
            figure = make[name]() if name in make else None
            if figure is not None:
                svg, png = (folder / f"{name}.{kind}" for kind in ("svg", "png"))
                save(figure, svg, png)
                drawn.append(Drawn(name, title, caption, svg, png))
    return drawn


def arm_table(
    rows: Sequence[Row], endpoints: Sequence[str] = (UNIVERSE, OWN, EXACT)
) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of mean scores in percent, with intervals: a line per arm and endpoint, a column per size."""
    members = list(dict.fromkeys(row.member for row in sorted(rows, key=lambda row: row.size)))
    lines = []
    for arm in dict.fromkeys(row.arm for row in rows):
        for endpoint in endpoints:
            try:
                table = causal.scores(rows, arm, endpoint)
            except UserError:  # an arm without facts has no recall of its own
                continue
            cells = []
            for m in members:
                e = causal.mean(table[m]) if m in table else None
                text = "–" if e is None else f"{e.value:.1f}"
                cells.append(f"{text} [{e.low:.1f}, {e.high:.1f}]" if e and e.known else text)
            lines.append([arm, named(rows, endpoint), str(max(len(t) for t in table.values())), *cells])
    return ["arm", "score (%)", "seeds", *members], lines


def effect_table(verdict: causal.Verdict) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the rule's interactions on both scales."""
    lines = []
    for name, e in verdict.interactions.items():
        endpoint, scale = name.removesuffix(")").split(" (")
        unit = "points" if scale == "points" else "log-odds"
        lines.append([NAMES.get(endpoint, endpoint), unit, interval(e, 1 if scale == "points" else 2)])
    return ["interaction of size and filter", "per doubling, in", "loose minus filtered"], lines
