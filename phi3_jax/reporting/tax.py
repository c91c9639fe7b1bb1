"""What SFT and DPO change, by size, as a figure; the rule's lines are those of `scaling.tax`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.ticker import NullLocator

from phi3_jax import family, statistics
from phi3_jax.reporting.figures import STYLE, Drawn, save, sheet
from phi3_jax.scaling import tax
from phi3_jax.scaling.tax import lines_of as lines_of
from phi3_jax.units import human_count

_LOOKS = (("#777777", "o", "base"), ("#0072B2", "s", "after SFT"), ("#D55E00", "D", "after DPO"))
_NAMES = {
    "knowledge": "knowledge: sentences of the prose\ngone on with rightly (%)",
    "reasoning": "reasoning: unseen triples of numbers\nput in order (%)",
    "format": "format: replies that end (%)",
}


def figures(folder: Path) -> list[Drawn]:
    """One figure, into `folder`: scores of each stage by size, and below them what each stage changed.

    Raises:
      UserError: no stage with scores.
    """
    scores, sizes = tax.read(folder), {size: family.proxy(size, "pico").matrix_params for size in family.TRIO}
    seeds = sorted({seed for _, seed, _ in scores})
    with rc_context(STYLE):
        footer = f"proxies of scale pico, {len(seeds)} seeds: stand-ins of the released models, not those"
        figure = sheet(6.4, footer)
        axes = figure.subplots(2, len(tax.MEASURES), sharex=True)
        for (level, change), measure in zip(axes.T, tax.MEASURES, strict=True):
            for stage, (colour, marker, label) in zip(tax.STAGES, _LOOKS, strict=True):
                shift = 1.06 ** (tax.STAGES.index(stage) - 1)
                means = []
                for size, x in sizes.items():
                    y = [100 * scores[size, s, stage][measure] for s in seeds if (size, s, stage) in scores]
                    level.plot([x * shift] * len(y), y, marker, color=colour, alpha=0.35, markersize=4)
                    means.append(np.mean(y) if y else np.nan)
                level.plot([x * shift for x in sizes.values()], means, marker + "-", color=colour, label=label)
                if stage == tax.STAGES[0]:
                    continue
                for size, x in sizes.items():
                    found = 100 * tax.changes(scores, size, stage, measure)
                    if len(found) > 1:
                        e = statistics.over_seeds(found)
                        bar = [[e.value - e.low], [e.high - e.value]]
                        change.errorbar([x * shift], [e.value], bar, fmt=marker, color=colour)
            change.axhline(0, color="#000000", linewidth=0.8)
            level.set_title(_NAMES[measure], fontsize=10, loc="left")
            for ax in (level, change):
                ax.set_xscale("log")
                ax.xaxis.set_minor_locator(NullLocator())
                ax.set_xticks(list(sizes.values()), [f"{s}\n{human_count(n)}" for s, n in sizes.items()])
            change.set_xlabel("non-embedding parameters")
        axes[0][0].set_ylabel("score (%)")
        axes[1][0].set_ylabel("minus base, within a seed (points)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        svg, png = (folder / f"alignment_tax.{kind}" for kind in ("svg", "png"))
        save(figure, svg, png)
    caption = (
        "Above: means over seeds, and each seed, small. Below: score minus that of the base of the same seed, with 95 % t "
        "intervals over seeds. Beginnings of sentences and replies are about persons that no question of SFT was about."
    )
    return [Drawn("alignment_tax", "What SFT and DPO change, by size", caption, svg, png)]
