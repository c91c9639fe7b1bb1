"""The loss law of a study, drawn and tabled, and its forecasts beside what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from phi3_jax.reporting.figures import _figure
from phi3_jax.reporting.table import human
from phi3_jax.scaling import laws
from phi3_jax.scaling.forecast import Score

MARKERS = "ovs^DPX*"
SHADES = ("#08306B", "#0072B2", "#56B4E9", "#009E73", "#B8860B", "#D55E00", "#CC79A7", "#000000")


def frontier(fit: laws.Fit, scores: Sequence[Score], footer: str, unit: str = "nats per token") -> Figure:
    """Loss against compute (6 N D), a curve a size, with the law's frontier; stars are runs that were forecast."""
    figure = _figure(4.6, footer)
    left, right = figure.subplots(1, 2)
    label = laws.sizes(fit.n)
    low, high = fit.d.min() / 1.6, max([fit.d.max(), *(s.d for s in scores)]) * 1.6
    grid = np.geomspace(low, high, 80)
    for k in np.unique(label):
        here = label == k
        n, colour = float(np.exp(np.log(fit.n[here]).mean())), SHADES[k % len(SHADES)]
        left.plot(6 * n * grid, fit.law(n, grid), color=colour, linewidth=1.2)
        left.plot(6 * n * fit.d[here], fit.loss[here], MARKERS[k % len(MARKERS)], color=colour, label=f"{human(n)}")
    _stars(left, fit, scores, grid, lambda n, d: 6 * n * d)
    flops = np.geomspace(6 * fit.n.min() * low, 6 * max([fit.n.max(), *(s.n for s in scores)]) * high, 80)
    n, d = fit.law.optimum(flops)
    left.plot(flops, fit.law(n, d), color="#333333", linestyle=(0, (6, 3)), linewidth=1.4, label="frontier of the law")
    left.set_xscale("log")
    left.set_xlabel("training compute, 6 N D (FLOPs)")
    left.set_ylabel(f"loss ({unit})")
    bottom, top = left.get_ylim()
    left.set_ylim(bottom, top + 0.35 * (top - bottom))  # room for the legend above the curves
    left.legend(title="non-embedding parameters", fontsize=8, title_fontsize=8.5, loc="upper right", ncols=2)
    right.plot(np.log10(fit.law(fit.n, fit.d)), 100 * fit.residuals, "o", color="#0072B2", label="fitted runs")
    done = [s for s in scores if s.measured is not None]
    if done:
        x = np.log10([s.value for s in done])
        right.plot(
            x,
            [100 * np.log(s.measured / s.value) for s in done],
            "*",
            color="#D55E00",
            markersize=11,
            label="forecast runs",
        )
        for s, at in zip(done, x, strict=True):
            right.plot([at, at], [100 * np.log(v / s.value) for v in (s.low, s.high)], color="#D55E00", linewidth=1.2)
    # An interval without an end is cut off: the points set the scale.
    reach = max(np.abs(100 * fit.residuals).max(), *(abs(100 * np.log(s.measured / s.value)) for s in done), 0.5)
    right.set_ylim(-1.6 * reach, 1.6 * reach)
    right.axhline(0, color="#333333", linewidth=1)
    right.set_xlabel("log10 of the predicted loss")
    right.set_ylabel("measured over predicted (%)")
    right.set_title("Residuals, and the intervals of the forecasts", loc="left")
    right.legend(loc="best", fontsize=8.5)
    return figure


def _stars(
    ax: Axes, fit: laws.Fit, scores: Sequence[Score], grid: np.ndarray, flops: Callable[..., np.ndarray]
) -> None:
    done = [s for s in scores if s.measured is not None]
    for n in sorted({s.n for s in scores} - set(fit.n)):
        ax.plot(flops(n, grid), fit.law(n, grid), color="#666666", linewidth=1.2, linestyle=":")
    if done:
        ax.plot([flops(s.n, s.d) for s in done], [s.measured for s in done], "*", color="#D55E00", markersize=11,
                label="forecast before it ran")  # fmt: skip


def residual_panels(fit: laws.Fit, footer: str) -> Figure:
    """Residuals against N, D and D / N: a trend says that the form does not hold."""
    figure = _figure(3.4, footer)
    for ax, (x, name) in zip(
        figure.subplots(1, 3, sharey=True),
        ((fit.n, "non-embedding parameters"), (fit.d, "tokens"), (fit.d / fit.n, "tokens a parameter")),
        strict=True,
    ):
        ax.plot(x, 100 * fit.residuals, "o", color="#0072B2")
        ax.axhline(0, color="#333333", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ticks = np.geomspace(x.min(), x.max(), 4)
        ax.set_xticks(ticks, [human(t, 2) for t in ticks])
        ax.set_xlabel(name)
    figure.axes[0].set_ylabel("measured over predicted (%)")
    return figure


def corner(draws: np.ndarray, fit: laws.Fit, footer: str) -> Figure:
    """Bootstrapped E, alpha and beta in pairs, with the fit as a cross."""
    names, columns = ("E", "alpha", "beta"), (0, 3, 4)
    figure = _figure(6.0, footer)
    axes = figure.subplots(3, 3)
    for i, a in enumerate(columns):
        for j, b in enumerate(columns):
            ax = axes[i][j]
            if j > i:
                ax.set_axis_off()
                continue
            low, high = np.quantile(draws[:, b], (0.02, 0.98))
            if i == j:
                ax.hist(draws[:, a], bins=40, range=(low, high), color="#A6CEE3", edgecolor="#333333", linewidth=0.4)
                ax.axvline(getattr(fit.law, names[i]), color="#D55E00")
                ax.set_yticks([])
            else:
                ax.plot(draws[:, b], draws[:, a], ".", color="#0072B2", markersize=2, alpha=0.4)
                ax.plot([getattr(fit.law, names[j])], [getattr(fit.law, names[i])], "X", color="#D55E00", markersize=8)
                ax.set_ylim(*np.quantile(draws[:, a], (0.02, 0.98)))
            ax.set_xlim(low, high)
            if i == 2:
                ax.set_xlabel(names[j])
            if j == 0 and i:
                ax.set_ylabel(names[i])
            ax.xaxis.set_minor_locator(NullLocator())
    return figure


def law_table(fit: laws.Fit, draws: np.ndarray) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the law's parameters with bootstrap intervals, and of a, the exponent of the best size."""
    with_a = np.column_stack([draws, draws[:, 4] / (draws[:, 3] + draws[:, 4])])
    low, high = laws.interval(with_a)
    values = [*(getattr(fit.law, name) for name in laws.NAMES), fit.law.a]
    names = ("E, loss of an endless model and corpus", "A", "B", "alpha, exponent of N", "beta, exponent of D",
             "a = beta / (alpha + beta)")  # fmt: skip
    rows = [[name, f"{v:.4g}", f"{x:.4g} to {y:.4g}"] for name, v, x, y in zip(names, values, low, high, strict=True)]
    return ["L(N, D) = E + A / N^alpha + B / D^beta", "value", "95% interval"], rows


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of forecasts: predicted, interval, measured, error, and whether the interval held it."""
    rows = []
    for s in scores:
        came = ["not yet", "–", "–"] if s.measured is None else [
            f"{s.measured:.4f}", f"{100 * s.error:+.2f}%", "yes" if s.inside else "no"
        ]  # fmt: skip
        rows.append(
            [s.run, s.endpoint, human(s.n), human(s.d), f"{s.value:.4f}", f"{s.low:.4f} to {s.high:.4f}", *came]
        )
    header = [
        "run",
        "loss",
        "N",
        "tokens",
        "predicted",
        "95% prediction interval",
        "measured",
        "predicted minus measured",
        "inside",
    ]
    return header, rows
