"""The loss law of a study, drawn and tabled, and its forecasts compared with what came."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from phi3_jax.reporting.figures import sheet
from phi3_jax.scaling import intervals, laws
from phi3_jax.scaling.forecast import Score
from phi3_jax.units import human_count

MARKERS = "ovs^DPX*"
SHADES = ("#08306B", "#0072B2", "#56B4E9", "#009E73", "#B8860B", "#D55E00", "#CC79A7", "#000000")


def percent(residuals: np.ndarray) -> np.ndarray:
    """Residuals of logarithms as per cent of the prediction, which end at -100."""
    return 100 * np.expm1(residuals)


def frontier(fit: laws.Fit, scores: Sequence[Score], footer: str, unit: str = "nats per token") -> Figure:
    """Loss against compute (6 N D), a curve per size, with the law's frontier; stars are runs that were forecast."""
    figure = sheet(4.6, footer)
    left, right = figure.subplots(1, 2)
    label = laws.sizes(fit.n)
    low, high = fit.d.min() / 1.6, max([fit.d.max(), *(s.d for s in scores)]) * 1.6
    grid = np.geomspace(low, high, 80)
    for k in np.unique(label):
        here = label == k
        n, colour = float(np.exp(np.log(fit.n[here]).mean())), SHADES[k % len(SHADES)]
        left.plot(6 * n * grid, fit.law(n, grid), color=colour, linewidth=1.2)
        left.plot(
            6 * n * fit.d[here], fit.loss[here], MARKERS[k % len(MARKERS)], color=colour, label=f"{human_count(n)}"
        )
    _stars(left, fit, scores, grid, lambda n, d: 6 * n * d)
    flops = np.geomspace(6 * fit.n.min() * low, 6 * max([fit.n.max(), *(s.n for s in scores)]) * high, 80)
    best = fit.law(*fit.law.optimum(flops))
    left.plot(flops, best, color="#333333", linestyle=(0, (6, 3)), linewidth=1.4, label="frontier of the law")
    left.set_xscale("log")
    left.set_xlabel("training compute, 6 N D (FLOPs)")
    left.set_ylabel(f"loss ({unit})")
    bottom, top = left.get_ylim()
    left.set_ylim(bottom, top + 0.35 * (top - bottom))  # room for the legend above the curves
    left.legend(title="non-embedding parameters", fontsize=8, title_fontsize=8.5, loc="upper right", ncols=2)
    right.plot(np.log10(fit.law(fit.n, fit.d)), percent(fit.residuals), "o", color="#0072B2", label="fitted runs")
    done = [(s, 100 * (s.measured / s.value - 1)) for s in scores if s.measured is not None]
    if done:
        x = np.log10([s.value for s, _ in done])
        right.plot(
            x,
            [above for _, above in done],
            "*",
            color="#D55E00",
            markersize=11,
            label="forecast runs",
        )
        for (s, _), at in zip(done, x, strict=True):
            right.plot([at, at], [100 * (v / s.value - 1) for v in (s.low, s.high)], color="#D55E00", linewidth=1.2)
    # An interval without an end is cut off: the points set the scale.
    reach = max(np.abs(percent(fit.residuals)).max(), *(abs(above) for _, above in done), 0.5)
    right.set_ylim(max(-1.6 * reach, -100), 1.6 * reach)
    right.axhline(0, color="#333333", linewidth=1)
    right.set_xlabel("log10 of the predicted loss")
    right.set_ylabel("measured above predicted (%)")
    right.set_title("Residuals, and the intervals of the forecasts", loc="left")
    right.legend(loc="best", fontsize=8.5)
    return figure


def _stars(
    ax: Axes, fit: laws.Fit, scores: Sequence[Score], grid: np.ndarray, flops: Callable[..., np.ndarray]
) -> None:
    done = [(flops(s.n, s.d), s.measured) for s in scores if s.measured is not None]
    for n in sorted({s.n for s in scores} - set(fit.n)):
        ax.plot(flops(n, grid), fit.law(n, grid), color="#666666", linewidth=1.2, linestyle=":")
    if done:
        ax.plot([x for x, _ in done], [y for _, y in done], "*", color="#D55E00", markersize=11,
                label="forecast before it ran")  # fmt: skip


def residual_panels(fit: laws.Fit, footer: str) -> Figure:
    """Residuals against N, D and D / N: a trend says that the form does not hold."""
    figure = sheet(3.4, footer)
    for ax, (x, name) in zip(
        figure.subplots(1, 3, sharey=True),
        ((fit.n, "non-embedding parameters"), (fit.d, "tokens"), (fit.d / fit.n, "tokens per parameter")),
        strict=True,
    ):
        ax.plot(x, percent(fit.residuals), "o", color="#0072B2")
        ax.axhline(0, color="#333333", linewidth=1)
        ax.set_xscale("log")
        ax.xaxis.set_minor_locator(NullLocator())
        ticks = np.geomspace(x.min(), x.max(), 4)
        ax.set_xticks(ticks, [human_count(t, 2) for t in ticks])
        ax.set_xlabel(name)
    figure.axes[0].set_ylabel("measured above predicted (%)")
    return figure


def law_table(fit: laws.Fit, worth: intervals.Worth) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of the law's constants with their t intervals, and of a, the exponent of the best size."""
    names = ("E, loss of an endless model and corpus", "A", "B", "alpha, exponent of N", "beta, exponent of D",
             "a = beta / (alpha + beta)")  # fmt: skip
    rows = [
        [name, f"{getattr(fit.law, key):.4g}", f"{low:.4g} to {high:.4g}"]
        for name, (key, (low, high)) in zip(names, worth.constants().items(), strict=True)
    ]
    return ["L(N, D) = E + A / N^alpha + B / D^beta", "value", "95% interval (Student's t)"], rows


def score_table(scores: Sequence[Score]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of forecasts: predicted, interval, measured, error, and whether the interval held it."""
    rows = []
    for s in scores:
        came = ["not yet", "–", "–"] if s.measured is None or s.error is None else [
            f"{s.measured:.4f}", f"{100 * s.error:+.2f}%", "yes" if s.inside else "no"
        ]  # fmt: skip
        rows.append(
            [
                s.run,
                s.endpoint,
                human_count(s.n),
                f"{s.d:,.0f}",
                f"{s.value:.4f}",
                f"{s.low:.4f} to {s.high:.4f}",
                "–" if s.gadre is None else f"{s.gadre:.4f}",
                *came,
            ]
        )
    header = [
        "run",
        "loss",
        "N",
        "tokens",
        "predicted",
        "95% prediction interval",
        "by Gadre's form",
        "measured",
        "predicted minus measured",
        "inside",
    ]
    return header, rows
