"""Figures of plans: chip-hours and days of a sweep, and what fills a device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from phi3_jax.reporting.figures import sheet

if TYPE_CHECKING:
    from phi3_jax.study.plan import Plan

FOOTER = "Rooflines of the released models at 4.8T tokens: lower bounds, not measured"
MODELS = (("#A6CEE3", ""), ("#FDBF6F", "///"), ("#B2DF8A", "..."))
CATEGORIES = ("#08306B", "#56B4E9", "#A6CEE3", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#BBBBBB", "#FFFFFF")


def chip_hours(found: Mapping[str, Sequence[Plan]]) -> Figure:
    """Chip-hours and days of the proposal of each model, stacked, a bar for each topology."""
    figure = sheet(4.2, FOOTER)
    axes = figure.subplots(1, 2)
    labels = [f"{t}\n{three[0].proposal.setup.topology.chips} chips" for t, three in found.items()]
    for ax, what in zip(axes, ("chip-hours (thousands)", "days, one model after the other"), strict=True):
        bottom = np.zeros(len(found))
        for i, (colour, hatch) in enumerate(MODELS):
            ways = [(three[i], three[i].proposal) for three in found.values()]
            values = np.array([(p.chip_hours(w) / 1e3 if "hours" in what else p.days(w)) for p, w in ways])
            name = ways[0][1].setup.model.name
            ax.bar(labels, values, 0.6, bottom=bottom, color=colour, hatch=hatch, edgecolor="#333333", label=name)
            bottom += values
        ax.set_ylabel(what)
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(axis="x", visible=False)
    axes[0].legend(loc="upper right", fontsize=8.5)
    return figure


def memory(three: Sequence[Plan]) -> Figure:
    """Bytes a device by category, of each model's proposal, beside the device's limit."""
    from phi3_jax.planning.memory import limit

    figure = sheet(3.2, FOOTER)
    ax = figure.subplots()
    names = [plan.proposal.setup.model.name for plan in three]
    left = np.zeros(len(three))
    categories = [plan.proposal.memory.categories() for plan in three]
    for colour, key in zip(CATEGORIES, categories[0], strict=False):
        values = np.array([c[key] / 1e9 for c in categories])
        if values.max() > 0.05:
            ax.barh(names, values, 0.55, left=left, color=colour, edgecolor="#333333", label=key)
            left += values
    bound = limit(three[0].proposal.setup) / 1e9
    ax.axvline(bound, color="#333333", linestyle=(0, (6, 3)), label="what a device can give")
    ax.set_xlabel(f"GB a device of {three[0].proposal.setup.topology.text}")
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8.5)
    return figure
