"""What is known, got wrong and invented by size, as a figure; the rule's lines are those of `scaling.abstention`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import NullLocator

from phi3_jax import family
from phi3_jax.reporting.figures import STYLE, Drawn, save, sheet
from phi3_jax.scaling import abstention, causal
from phi3_jax.scaling.abstention import lines_of as lines_of
from phi3_jax.scaling.causal import Row
from phi3_jax.units import human_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FREE = "abstention/free/"
_BLUE, _ORANGE, _GREEN = "#0072B2", "#D55E00", "#009E73"
# Panels: title, and lines as (label, arm, endpoint, colour, marker, line).
PANELS = (
    (
        "known or reasoned, 9,000 persons (%)",
        (
            ("values recalled from the name", "facts9000", "knowledge/universe/recall", _BLUE, "o", "-"),
            ("one step of reasoning", "facts9000", "reasoning/gap1/accuracy", _ORANGE, "s", "-"),
            ("whole rows of reasoning", "facts9000", "reasoning/row/exact", _ORANGE, "D", "--"),
        ),
    ),
    (
        "wrong answers at 90 % coverage (%)",
        (
            ("9,000 persons learnt", "facts9000", f"{FREE}wrong_at_90", _BLUE, "o", "-"),
            ("4,500 (two seeds)", "facts4500", f"{FREE}wrong_at_90", _ORANGE, "s", "-"),
            ("1,500", "facts1500", f"{FREE}wrong_at_90", _GREEN, "D", "-"),
        ),
    ),
    (
        "values invented of strangers (%)",
        (
            ("9,000 persons, at 90 % coverage", "facts9000", f"{FREE}invented_at_90", _BLUE, "o", "-"),
            ("9,000, where p > 1/2", "facts9000", f"{FREE}invented_at_half", _BLUE, "o", "--"),
            ("1,500, at 90 % coverage", "facts1500", f"{FREE}invented_at_90", _GREEN, "D", "-"),
        ),
    ),
)


def draw(rows: Sequence[Row]) -> Figure:
    """Means over seeds by size, and each seed, small and pale.

    Args:
      rows: of the study; sizes that none has have no tick.
    """
    sizes = {row.member: row.size for row in sorted(rows, key=lambda row: row.size) if row.member in family.TRIO}
    seeds = {row.seed for row in rows}
    with rc_context(STYLE):
        count = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}"
        figure = sheet(4.4, f"proxies of scale pico, {count}: stand-ins of the released models, not those")
        for ax, (title, lines) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for label, arm, endpoint, colour, marker, line in lines:
                cells = [list(abstention.value(rows, (arm, size, endpoint)).values()) for size in sizes]
                for x, cell in zip(sizes.values(), cells, strict=True):
                    ax.plot([x] * len(cell), 100 * np.array(cell), marker, color=colour, alpha=0.3, markersize=4)
                means = [100 * np.mean(cell) if cell else np.nan for cell in cells]
                ax.plot(list(sizes.values()), means, marker + line, color=colour, label=label)
            ax.set_title(title, fontsize=10, loc="left")
            ax.set_ylim(0, 100)
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(list(sizes.values()), [f"{size}\n{human_count(n)}" for size, n in sizes.items()])
            ax.set_xlim(min(sizes.values()) / 1.25, max(sizes.values()) * 1.25)
            ax.set_xlabel("non-embedding parameters")
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), fontsize=8.5, frameon=False, handlelength=3)
    return figure


def figures(folder: Path) -> list[Drawn]:
    """The figure, into `folder`.

    Raises:
      UserError: no table of runs.
    """
    svg, png = (folder / f"invention.{kind}" for kind in ("svg", "png"))
    save(draw(causal.read(folder / "runs.csv")), svg, png)
    caption = (
        "Lines are means over seeds, pale marks each seed. Middle and right: the model abstains below the probability at "
        "which it answers 90 % of what it knows. Shares are of all values that are asked: of a universe of 9,000 persons, "
        "and of 3,000 strangers."
    )
    return [Drawn("invention", "What is known, got wrong and invented, by size", caption, svg, png)]
