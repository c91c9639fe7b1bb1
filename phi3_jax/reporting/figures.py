"""The figures of a report, drawn with matplotlib (imported here, lazily by the page; no display, no pyplot).

Colours are Okabe and Ito's, safe for colour-blind readers, and never the only sign: sizes differ in marker
too, budgets in line style. Every figure carries the label of what was really trained in its footer.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from matplotlib.transforms import ScaledTranslation

from phi3_jax.data.corpora.reasoning import depthless_policies
from phi3_jax.family import MEMBERS, ROUNDED, SIZES, TRIO
from phi3_jax.records import files
from phi3_jax.records.table import Run, what_was_trained
from phi3_jax.reporting.gains import Cell, Gain, budgets, cells, corpus_bits, gains, recall_ceiling
from phi3_jax.scaling.endpoints import Endpoint, endpoints, log_odds_sensible, plotted_losses
from phi3_jax.statistics import Estimate
from phi3_jax.units import human_count, number

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

OTHER_SIZE = ("#666666", "^")
_STYLES = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "D"), ("#999999", "v"), ("#CC79A7", "^"), ("#B8860B", "P"),
    ("#000000", "X"), ("#56B4E9", "<"), ("#E69F00", ">"), ("#5D3A9B", "p"),
)  # fmt: skip
# The report's three, the sizes around them, further members: a new member changes no other's colour.
SIZE_STYLE = dict(
    zip((*TRIO, *(s for s in SIZES if s not in MEMBERS), *(m for m in MEMBERS if m not in TRIO)), _STYLES)
)
BUDGET_STYLE = (("#9ECAE1", ":"), ("#56B4E9", "--"), ("#0072B2", "-."), ("#08306B", "-"))
DEPTH_STYLE = (("#0072B2", "-", "o"), ("#CC79A7", "--", "s"), ("#E69F00", "-.", "D"), ("#000000", ":", "^"))
GAIN_STYLE = (("#0072B2", "o", f"{TRIO[0]} to {TRIO[1]}"), ("#D55E00", "s", f"{TRIO[1]} to {TRIO[2]}"))
STYLE: dict[RcKeyType, Any] = {
    "font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "legend.fontsize": 9, "axes.grid": True,
    "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "lines.linewidth": 1.8, "lines.markersize": 6,
    "svg.hashsalt": "phi3_jax", "svg.fonttype": "path", "figure.dpi": 100, "errorbar.capsize": 3,
}  # fmt: skip
WIDTH = 11.0  # inches: 1,056 px on the page


@dataclasses.dataclass(frozen=True)
class Drawn:
    """One figure on disk: its files, title and caption."""

    name: str
    title: str
    caption: str
    svg: Path
    png: Path


def size_style(member: str) -> tuple[str, str]:
    """Colour and marker of a size."""
    return SIZE_STYLE.get(member, OTHER_SIZE)


def _budget_style(index: int, count: int) -> tuple[str, str]:
    """Colour and line style of a budget: the largest is always the darkest and solid."""
    return BUDGET_STYLE[max(len(BUDGET_STYLE) - count + index, index % len(BUDGET_STYLE) if count > 4 else 0)]


def sheet(height: float, footer: str) -> Figure:
    """An empty figure of the page's width, `height` inches high, with a line at its foot that says what was trained."""
    figure = Figure(figsize=(WIDTH, height), facecolor="white")
    figure.set_layout_engine("constrained", rect=(0.0, 0.28 / height, 1.0, 1 - 0.28 / height), w_pad=0.12, h_pad=0.1)
    figure.text(0.008, 0.07 / height, footer, fontsize=8.5, color="#444444", ha="left", va="bottom")
    return figure


def _size_axis(ax: Axes, table: Iterable[Cell]) -> None:
    """Log axis with a tick at every size that was trained; in-between sizes lower, so labels do not meet."""
    sizes: dict[float, set[str]] = {}
    for c in table:
        sizes.setdefault(c.size, set()).add(c.member)
    named = {size: ", ".join(m for m in MEMBERS if m in members) for size, members in sorted(sizes.items())}
    labels = [f"{name}\n{human_count(size)}" if name else f"\n\n{human_count(size)}" for size, name in named.items()]
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(sorted(sizes), labels, fontsize=9)
    ax.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
    ax.set_xlabel("non-embedding parameters trained")


def _token_axis(ax: Axes, tokens: Iterable[float]) -> None:
    ticks = sorted({float(f"{t:.2g}") for t in tokens})
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(ticks, [human_count(t, 2) for t in ticks], fontsize=9)
    ax.set_xlim(min(ticks) / 1.25, max(ticks) * 1.25)
    ax.set_xlabel("training tokens of the run")


def _line(
    ax: Axes, points: list[Cell], x: Callable[[Cell], float], colour: str, style: str, label: str,
    marker: str | None = None, factor: float = 1.0,
) -> None:  # fmt: skip
    """Means joined by a line, 95% intervals, and each seed's value as a small dot where there are several."""
    points = sorted(points, key=x)
    ax.plot(
        [x(c) for c in points],
        [factor * c.value for c in points],
        style,
        color=colour,
        label=label,
        marker=marker,
    )
    for c in points:
        if c.low is not None and c.high is not None:
            below, above = factor * max(c.value - c.low, 0.0), factor * max(c.high - c.value, 0.0)
            ax.errorbar([x(c)], [factor * c.value], yerr=[[below], [above]], color=colour, linewidth=1.3, fmt="none")
        if len(c.by_seed) > 1:
            values = [factor * v for v in c.by_seed.values()]
            ax.plot([x(c)] * len(values), values, ".", color=colour, alpha=0.45, markersize=4, zorder=1)
    if marker is None:
        for c in points:
            ax.plot([x(c)], [factor * c.value], size_style(c.member)[1], color=colour, markersize=6)


def _by_budget(ax: Axes, table: dict[tuple[str, str], Cell], factor: float = 1.0) -> None:
    """One line a budget against size."""
    names = budgets(table.values())
    for i, budget in enumerate(names):
        colour, style = _budget_style(i, len(names))
        found = [c for c in table.values() if c.budget == budget]
        _line(ax, found, lambda c: c.size, colour, style, f"{budget} tokens", factor=factor)
    _size_axis(ax, table.values())


def loss_figure(runs: list[Run], footer: str) -> Figure | None:
    """Final loss against parameters at each budget, and against tokens for each size; a row a domain."""
    losses = plotted_losses(endpoints(runs))[:6]
    if not losses:
        return None
    figure = sheet(3.4 * len(losses) + 0.3, footer)
    axes = figure.subplots(len(losses), 2, squeeze=False, sharey="row")
    for (left, right), endpoint in zip(axes, losses, strict=True):
        table = cells(runs, endpoint)
        _by_budget(left, table)
        for member in sorted({c.member for c in table.values()}, key=lambda m: _size_of(table, m)):
            found = [c for c in table.values() if c.member == member]
            colour, marker = size_style(member)
            label = f"{member} ({human_count(found[0].size)})"
            _line(right, found, lambda c: c.tokens, colour, "-", label, marker)
        _token_axis(right, [c.tokens for c in table.values()])
        left.set_ylabel(f"loss ({endpoint.unit})")
        left.set_title(f"{endpoint.label}: against parameters", loc="left")
        right.set_title(f"{endpoint.label}: against tokens", loc="left")
        right.yaxis.set_tick_params(labelleft=True)
        _bits_per_byte_axis(right, runs, endpoint)
        if endpoint is losses[0]:
            _legend_above(left)
            _legend_above(right)
    return figure


def _legend_above(ax: Axes, columns: int = 3) -> None:
    """A legend over the title, where no curve can be under it."""
    above = ax.transAxes + ScaledTranslation(0, 23 / 72, ax.figure.dpi_scale_trans)
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        bbox_transform=above,
        ncols=columns,
        borderaxespad=0.0,
        columnspacing=1.2,
    )


def _bits_per_byte_axis(ax: Axes, runs: list[Run], endpoint: Endpoint) -> None:
    """A second scale in bits per byte: nats per token times one constant of the data."""
    other = (endpoint.suite, endpoint.task, "bits_per_byte")
    pairs = [
        (r.finals[endpoint.key]["value"], r.finals[other]["value"])
        for r in runs
        if other in r.finals and endpoint.key in r.finals
    ]
    if not pairs or not all(nats > 0 for nats, _ in pairs):
        return
    factor = sum(bits / nats for nats, bits in pairs) / len(pairs)
    scale = ax.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
    scale.set_ylabel("bits per byte")


def _size_of(table: dict[tuple[str, str], Cell], member: str) -> float:
    return next(c.size for c in table.values() if c.member == member)


def knowledge_figure(runs: list[Run], footer: str) -> Figure | None:
    """Recall with its ceiling, and stored bits, against size."""
    known = {e.key: e for e in endpoints(runs) if e.suite == "knowledge" and not e.down}
    recalls = [e for e in known.values() if e.metric == "recall"]
    panels = recalls + [e for e in known.values() if e.metric == "bits_per_parameter"]
    if not panels:
        return None
    figure = sheet(4.2, footer)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, endpoint in zip(axes, panels, strict=True):
        table = cells(runs, endpoint)
        _by_budget(ax, table, 100.0 if endpoint.proportion else 1.0)
        ax.set_title(endpoint.label, loc="left", wrap=True, fontsize=10)
        if endpoint.proportion:
            ax.set_ylabel("attribute values recalled (%)")
            ax.set_ylim(0, 104)
            ceiling = recall_ceiling(runs) if endpoint.task == "universe" else None
            if ceiling is not None:
                ax.axhline(100 * ceiling, color="#333333", linestyle=(0, (6, 3)), linewidth=1.1)
                ax.annotate(
                    f"ceiling {100 * ceiling:.1f}%: facts in the corpus", (0.02, 100 * ceiling), (0, 4),
                    xycoords=("axes fraction", "data"), textcoords="offset points", ha="left", fontsize=8.5,
                )  # fmt: skip
        else:
            ax.set_ylabel("bits per non-embedding parameter")
            ax.set_ylim(bottom=0)
            _demand_line(ax, runs, table)
    handles, _ = axes[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))
    return figure


def _demand_line(ax: Axes, runs: list[Run], table: dict[tuple[str, str], Cell]) -> None:
    bits = corpus_bits(runs)
    if bits is None:
        return
    sizes = sorted({c.size for c in table.values()})
    grid = np.geomspace(sizes[0] / 1.2, sizes[-1] * 1.2, 60)
    ax.plot(grid, bits / grid, color="#333333", linestyle=(0, (6, 3)), linewidth=1.1)
    ax.set_ylim(0, 1.12 * max(bits / sizes[0], *(c.value for c in table.values())))
    ax.annotate(
        "all bits of the corpus",
        (sizes[0], bits / sizes[0]),
        (8, 0),
        textcoords="offset points",
        fontsize=8.5,
        va="center",
    )


def reasoning_figure(runs: list[Run], footer: str) -> Figure | None:
    """Exact row against size at each budget; accuracy by depth against size at the largest budget."""
    shares = [e for e in endpoints(runs) if e.suite == "reasoning" and e.proportion]
    if not shares:
        return None
    main = [e for e in shares if not e.task.startswith(("gap", "depth"))][:2]
    graded = [e for e in shares if e not in main]
    figure = sheet(4.2, footer)
    axes = figure.subplots(1, len(main) + bool(graded), squeeze=False)[0]
    for ax, endpoint in zip(axes, main, strict=False):
        table = cells(runs, endpoint)
        _by_budget(ax, table, 100.0)
        ax.set_title(endpoint.label, loc="left")
        ax.set_ylabel("outputs right (%)" if endpoint.task == "all" else "items right (%)")
        depth_floor(ax, endpoint.column)
    if graded:
        _by_depth(axes[-1], runs, graded)
    if main:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=6)
    return figure


def depth_floor(ax: Axes, column: str) -> None:
    """Lines at what policies reach that compose few unwritten steps; see `reasoning.depthless_policies`."""
    policies = depthless_policies()
    drawn = {
        "reasoning/row/exact": {"two unwritten steps at most": policies["compose_2"].exact},
        "reasoning/all/accuracy": {
            "the last step alone": policies["last_step"].accuracy,
            "one unwritten step at most": policies["compose_1"].accuracy,
        },
    }
    for what, value in drawn.get(column, {}).items():
        ax.axhline(100 * value, color="#666666", linestyle=(0, (1, 2)), linewidth=1.1)
        ax.annotate(
            f"{what}: {100 * value:.0f}%", (0.02, 100 * value), (0, 3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="left", fontsize=8, color="#444444",
        )  # fmt: skip


def _by_depth(ax: Axes, runs: list[Run], graded: list[Endpoint]) -> None:
    tables = [(e, cells(runs, e)) for e in graded]
    names = budgets(c for _, t in tables for c in t.values())
    shown = []
    for i, (endpoint, table) in enumerate(tables):
        colour, style, marker = DEPTH_STYLE[i % len(DEPTH_STYLE)]
        found = [c for c in table.values() if c.budget == names[-1]]
        shown += found
        _line(ax, found, lambda c: c.size, colour, style, _depth_name(endpoint), marker, factor=100.0)
    _size_axis(ax, shown)
    chance = {c.chance for c in shown if c.chance}
    note = f", chance {100 * chance.pop():.1f}%" if len(chance) == 1 else ""
    ax.set_title(f"By depth at {names[-1]} tokens{note}", loc="left")
    ax.set_ylabel("outputs right (%)")
    _legend_above(ax)


def _depth_name(endpoint: Endpoint) -> str:
    """'gap 2' of 'gap2'."""
    return endpoint.task.replace("gap", "gap ").replace("depth", "depth ")


def _estimate(ax: Axes, y: float, value: Estimate, colour: str, marker: str) -> None:
    """A dot with its interval; hollow where the interval includes zero, there is none, or one seed is behind it."""
    if value.known:
        ax.plot([value.low, value.high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
    face = colour if value.sign and value.n > 1 else "white"
    ax.plot([value.value], [y], marker, color=colour, markerfacecolor=face, markersize=6.5)


def _forest(axes: list[Axes], columns: list[list[Gain]]) -> None:
    """Pairs of axes (both gains, their contrast) for each column of gains; rows are endpoint and budget."""
    for k, found in enumerate(columns):
        left, right = axes[2 * k], axes[2 * k + 1]
        for y, gain in enumerate(found):
            for (colour, marker, _), value, shift in zip(
                GAIN_STYLE, (gain.first, gain.second), (-0.16, 0.16), strict=True
            ):
                _estimate(left, y + shift, value, colour, marker)
            _estimate(right, y, gain.contrast, "#000000", "D")
        for ax in (left, right):
            ax.axvline(0, color="#333333", linewidth=1)
            ax.set_ylim(len(found) - 0.5, -0.5)
            ax.grid(axis="y", visible=False)
            ax.set_yticks(range(len(found)), [""] * len(found))
            for y in range(1, len(found)):
                if found[y].endpoint != found[y - 1].endpoint:
                    ax.axhline(y - 0.5, color="#BBBBBB", linewidth=0.8)
    if columns:
        names = [f"{g.endpoint.label} · {g.budget}" for g in columns[0]]
        axes[0].set_yticks(range(len(names)), names, fontsize=9)


def gains_figure(runs: list[Run], footer: str) -> Figure | None:
    """Gain per doubling mini to small and small to medium, and second minus first: scores, then losses."""
    ends = endpoints(runs)
    shares = [e for e in ends if log_odds_sensible(e)]
    points, odds = ([g for e in shares for g in gains(runs, e, scale)] for scale in ("points", "logit"))
    losses = [g for e in plotted_losses(ends) for g in gains(runs, e, "unit")]
    heights = [len(block) for block in (points, losses) if block]
    if not heights:
        return None
    inches = [0.36 * h + 1.0 for h in heights]
    figure = sheet(sum(inches) + 0.75, footer)
    grid = figure.add_gridspec(len(heights), 4, height_ratios=inches)
    if points:
        axes = [figure.add_subplot(grid[0, i]) for i in range(4)]
        _forest(axes, [points, odds])
        names = ("gain per doubling\n(percentage points)", "second minus first\n(percentage points)",
                 "gain per doubling\n(log-odds)", "second minus first\n(log-odds)")  # fmt: skip
        for ax, name in zip(axes, names, strict=True):
            ax.set_xlabel(name)
    if losses:
        axes = [figure.add_subplot(grid[-1, 0:2]), figure.add_subplot(grid[-1, 2:4])]
        _forest(axes, [losses])
        unit = " or ".join(dict.fromkeys(g.endpoint.unit for g in losses))
        axes[0].set_xlabel(f"loss saved per doubling ({unit})")
        axes[1].set_xlabel(f"second minus first ({unit})")
    verb = "" if all(r.scale == "full" for r in runs) else "stands for "
    pairs = zip(GAIN_STYLE, TRIO[:2], TRIO[1:], strict=True)
    handles = [
        figure.axes[0].plot([], [], marker, color=colour, label=f"{text} ({verb}{ROUNDED[a]} to {ROUNDED[b]})")[0]
        for (colour, marker, text), a, b in pairs
    ]
    handles += figure.axes[0].plot([], [], "D", color="#000000", label="second minus first")
    handles += figure.axes[0].plot(
        [], [], "o", color="#777777", markerfacecolor="white", label="hollow: interval includes 0, or none"
    )
    figure.legend(handles=handles, loc="outside upper center", ncols=4, fontsize=9, handletextpad=0.3)
    return figure


def _curve(rows: list[dict], key: str, points: int = 800) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and a metric, thinned by averaging neighbours so that a long run stays a small file."""
    pairs = [(t, v) for r in rows if (t := number(r.get("tokens"))) and (v := number(r.get(key))) is not None]
    if not pairs:
        return np.zeros(0), np.zeros(0)
    array = np.array(sorted(pairs))
    if len(array) > points:
        array = np.stack([block.mean(0) for block in np.array_split(array, points)])
    return array[:, 0], array[:, 1]


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean; the ends use what is there."""
    half = width // 2
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def training_figure(runs: list[Run], footer: str) -> Figure | None:
    """Training loss against tokens: a column per size, a row a domain; trunks solid, WSD forks dashed."""
    runs = [r for r in runs if any("loss" in row for row in r.metrics)]
    if not runs:
        return None
    members = list(dict.fromkeys(r.member for r in sorted(runs, key=lambda r: r.size or 0)))
    keys = sorted({k for r in runs for row in r.metrics for k in row if k.startswith("loss/")})
    keys = keys if 1 < len(keys) <= 3 and len(members) <= 4 else ["loss"]
    panels = [(key, member) for key in keys for member in members]
    columns = min(4, len(members))
    rows = -(-len(panels) // columns)
    figure = sheet(2.9 * rows + 0.75, footer)
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row" if len(keys) > 1 else "all", sharex=True)
    most = max((t for r in runs if (t := r.last("tokens"))), default=1.0)
    unit, name = next(((u, n) for u, n in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if most >= u), (1.0, ""))
    seen: dict[str, list[np.ndarray]] = {key: [] for key in keys}
    for ax, (key, member) in zip(axes.flat, panels, strict=False):
        mine = [r for r in runs if r.member == member]
        first = min(r.seed for r in mine)
        seen[key] += [_draw_run(ax, run, key, unit, run.seed == first) for run in mine]
        ax.set_title(f"{member} ({human_count(mine[0].size)})" + (f": {key[5:]}" if key != "loss" else ""), loc="left")
        ax.set_xlim(left=0)
        ax.xaxis.set_tick_params(labelbottom=True)
        ax.set_xlabel(f"tokens seen ({name})" if name else "tokens seen")
    for i, row in enumerate(axes):
        values = np.concatenate(seen[panels[i * columns][0]])
        if len(values):
            low, high = np.quantile(values, (0.0, 0.98))
            row[0].set_ylim(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9)
        row[0].set_ylabel("training loss (nats)")
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    _training_legend(figure, axes[0][0], runs)
    return figure


def _draw_run(ax: Axes, run: Run, key: str, unit: float, first_seed: bool) -> np.ndarray:
    tokens, loss = _curve(run.metrics, key)
    if not len(tokens):
        return loss
    colour = "#000000" if run.parent else size_style(run.member)[0]
    smooth = _smooth(loss, max(3, len(loss) // 60))
    style, width = ("--", 1.2) if run.parent else ("-", 1.6)
    if first_seed:
        ax.plot(tokens / unit, loss, color=colour, alpha=0.18, linewidth=0.8)
        ax.plot(tokens / unit, smooth, style, color=colour, linewidth=width)
        if run.finished:
            ax.plot(tokens[-1:] / unit, smooth[-1:], size_style(run.member)[1], color=colour, markersize=5)
        else:
            ax.plot(
                tokens[-1:] / unit,
                smooth[-1:],
                "x",
                color="#C00000",
                markersize=8,
                markeredgewidth=2,
                zorder=5,
            )
    else:
        ax.plot(tokens / unit, smooth, style, color=colour, alpha=0.35, linewidth=0.8)
    return smooth


def _training_legend(figure: Figure, ax: Axes, runs: list[Run]) -> None:
    def entry(style: str, label: str, **more: Any) -> None:
        handles.append(ax.plot([], [], style, label=label, **more)[0])

    handles: list[Line2D] = []
    entry("-", "trunk, running mean", color="#0072B2")
    if any(r.parent for r in runs):
        entry("--", "fork: learning rate to 0 for a smaller budget", color="#000000", linewidth=1.2)
    if len({r.seed for r in runs}) > 1:
        entry("-", "further seeds", color="#0072B2", alpha=0.35, linewidth=0.8)
    if any(not r.finished for r in runs):
        entry("x", "stopped or failed here", color="#C00000", markersize=8, markeredgewidth=2)
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=9)


FIGURES: tuple[tuple[str, str, str, str, Callable[[list[Run], str], Figure | None]], ...] = (
    ("loss", "Loss against parameters and tokens",
     "Loss of the evaluation at the end of each finished run: text and reasoning items are held out, "
     "facts of the corpus are what was to be learned. Bars are 95% intervals over test items, and over "
     "seeds where there are several (small dots).",
     "no finished run has a loss in its last evaluation", loss_figure),
    ("knowledge", "Knowledge against size",
     "Share of attribute values a model completes exactly, with 95% intervals as in the figure of losses. The dashed "
     "ceiling is a model that knows every fact of its corpus and guesses the others; the dashed curve on the right "
     "is all bits of the corpus, which caps what larger sizes can store.",
     "no finished run has knowledge scores", knowledge_figure),
    ("reasoning", "Reasoning against size",
     "Fresh items that nothing can memorise, with 95% intervals as in the figure of losses. Gap g: an "
     "output that needs g steps in one go.",
     "no finished run has reasoning scores", reasoning_figure),
    ("gains", "Gain per doubling of parameters: the first step and the second",
     "Change of a score divided by the doublings of non-embedding parameters between two sizes; right "
     "of zero is better. A claim that holds in points and not in log-odds points to a ceiling.",
     "it needs finished runs of mini, small and medium at one budget with a seed in common", gains_figure),
    ("training", "Training curves",
     "Training loss as logged (pale) and its running mean. A budget below the largest is a fork of the "
     "trunk whose learning rate falls to zero.",
     "no run has logged a training loss", training_figure),
)  # fmt: skip


def save(figure: Figure, *paths: Path) -> None:
    """Writes a figure as the suffixes say, .svg or .png at 150 dpi; each file is whole or as it was.

    The same figure is the same file: an .svg has no date, and its ids are made of what they name.
    """
    for path in paths:
        content, kind = io.BytesIO(), path.suffix.removeprefix(".")
        with rc_context({"svg.hashsalt": "phi3_jax"}):
            figure.savefig(content, format=kind, **({"metadata": {"Date": None}} if kind == "svg" else {"dpi": 150}))
        files.write_bytes(path, content.getvalue())


def draw(runs: list[Run], folder: Path, suffix: str = "") -> tuple[list[Drawn], list[str]]:
    """Draws what the runs allow into `folder` as SVG and PNG (150 dpi).

    Returns: the figures, and one line `title: why` for each that was left out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn, left_out = [], []
    footer = what_was_trained(runs)
    with rc_context(STYLE):
        for name, title, caption, reason, make in FIGURES:
            figure = make(runs, footer)
            if figure is None:
                left_out.append(f"{title}: {reason}")
                continue
            svg, png = (folder / f"{name}{suffix}.{kind}" for kind in ("svg", "png"))
            save(figure, svg, png)
            drawn.append(Drawn(name + suffix, title, caption, svg, png))
    return drawn, left_out
