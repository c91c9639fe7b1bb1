"""The page of an extension: losses by position, needles by depth, factors beside released ones, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from phi3_jax.data.long_rows import DEPTHS
from phi3_jax.extension.lists import FORMS
from phi3_jax.family import RELEASED, published
from phi3_jax.records import files
from phi3_jax.reporting import markup
from phi3_jax.reporting.figures import STYLE, Drawn, save, sheet
from phi3_jax.reporting.sections import figure_list

NAME = "extension.html"
TRAINED = "after training"
_LOOKS = (("#999999", "v"), ("#E69F00", "^"), ("#009E73", "D"), ("#56B4E9", "s"), ("#D55E00", "o"), ("#000000", "X"))
Result = Mapping[str, Any]  # the content of factors.json
Lists = Mapping[
    str, Result
]  # what each list makes of the unseen rows, and the trained model with the list that was found


def write(out: Path, result: Result, label: str) -> Path:
    """Writes `extension.html`, and its figures beside it, into the folder of an extension.

    Args:
      result: the content of factors.json.
      label: what was extended.
    """
    made, drawn = result["made_by"], []
    found = {name: one["unseen"] for name, one in made["lists"].items()}
    if "trained" in made:
        found[TRAINED] = made["trained"]["unseen"]
    (out / "figures").mkdir(exist_ok=True)
    with rc_context(STYLE):
        for name, title, caption, draw in _FIGURES:
            if (figure := draw(result, found, label)) is not None:
                svg, png = (out / "figures" / f"extension-{name}.{kind}" for kind in ("svg", "png"))
                save(figure, svg, png)
                drawn.append(Drawn(name, title, caption, svg, png))
    title = f"{label}: a window of {result['max_position_embeddings']:,} tokens"
    answer = "".join(f"<p>{markup.text(line)}</p>" for line in _answer(result, found))
    body = [f"<h1>{markup.text(title)}</h1>", f'<div class="headline">{answer}</div>']
    body += [figure_list(drawn, [] if "needles" in {d.name for d in drawn} else [_NO_NEEDLES], label)]
    body += ["<h2>Lists</h2>", _table(result, found), "<h2>What it took</h2>", _costs(made)]
    files.write_text(out / NAME, markup.page(title, body))
    return out / NAME


def _answer(result: Result, found: Lists) -> list[str]:
    """The first screen, in sentences."""
    made, first = result["made_by"], result["original_max_position_embeddings"]
    method = made["method"]
    closed = {name: one["beyond"] for name, one in found.items() if name in FORMS and name not in ("none", method)}
    best = min(closed, key=lambda name: closed[name]) if closed else "none"
    beside = f"{closed[best]:.3f} with the best closed form beside it ({best}), and " if closed else ""
    lines = [
        f"Beyond the first {first:,} tokens of text that no search saw, the loss is {found[method]['beyond']:.3f} nats per "
        f"token with the list of {method}, {beside}{found['none']['beyond']:.3f} with no list."
    ]
    if digits := found[method]["digits"]:
        longest = max(digits, key=int)
        lines.append(
            f"At {int(longest):,} tokens it finds {100 * digits[longest]:.0f} % of the digits of needles, "
            + (f"{best} {100 * found[best]['digits'][longest]:.0f} %, " if closed else "")
            + f"no list {100 * found['none']['digits'][longest]:.0f} %."
        )
    if trained := made.get("trained"):
        lines.append(
            f"After {trained['tokens']:,} tokens of training in the long window the loss there is "
            f"{trained['unseen']['beyond']:.3f}. Inputs of at most {first:,} tokens cost {trained['short_before']:.3f} "
            f"nats per token before, and {trained['short']:.3f} now."
        )
    return [*lines, "One search of one model: nothing here says how another seed would end."]


def _by_position(result: Result, found: Lists, label: str) -> Figure:
    """Loss against position, a line a list."""
    figure = sheet(4.2, label)
    ax = figure.subplots()
    for (colour, marker), (name, one) in zip(_looks(found), found.items(), strict=True):
        bins = [tuple(map(int, key.split("-"))) for key in one["text"]]
        middle = [np.sqrt(max(a, b / 4) * b) for a, b in bins]
        ax.plot(
            middle, list(one["text"].values()), "--" if name == "none" else "-", color=colour, marker=marker, label=name
        )
    ax.axvline(result["original_max_position_embeddings"], color="#333333", linewidth=1, linestyle=(0, (6, 3)))
    ax.set_xscale("log")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xticks(middle, [f"{a:,} to {b:,}" for a, b in bins])
    ax.set_xlabel("position in the document; the dashed line is the original window")
    ax.set_ylabel("loss, nats per token")
    figure.legend(loc="outside upper center", ncols=len(found))
    return figure


def _needles(result: Result, found: Lists, label: str) -> Figure | None:
    """Share of digits by depth and length: no list, the list that was found, and after training."""
    shown = [n for n in ("none", result["made_by"]["method"], TRAINED) if found.get(n, {}).get("by_depth")]
    if not shown:
        return None
    figure = sheet(4.4, label)
    axes = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
    for ax, name in zip(axes, shown, strict=True):
        lengths = sorted(found[name]["by_depth"], key=int)
        grid = np.array([found[name]["by_depth"][length] for length in lengths]).T
        image = ax.imshow(grid, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        ax.grid(False)
        ax.set_title({"none": "no list", TRAINED: TRAINED}.get(name, f"list of {name}"), loc="left")
        ax.set_xticks(range(len(lengths)), [f"{int(length):,}" for length in lengths])
        ax.set_yticks(range(DEPTHS), [f"{100 * (d + 0.5) / DEPTHS:.0f}" for d in range(DEPTHS)])
        ax.set_xlabel("tokens of the row")
        for (y, x), value in np.ndenumerate(grid):
            ax.text(
                x,
                y,
                f"{100 * value:.0f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if value < 0.6 else "black",
            )
    axes[0].set_ylabel("depth of the needle, % of the row")
    figure.colorbar(image, ax=axes, label="share of digits")
    return figure


def _factors(result: Result, found: Lists, label: str) -> Figure:
    """Factors over s against the pair's place, those of released models beside them."""
    figure = sheet(4.2, label)
    ax = figure.subplots()
    lists = result["made_by"]["lists"]
    scale = result["max_position_embeddings"] / result["original_max_position_embeddings"]
    for (colour, marker), (name, one) in zip(_looks(lists), lists.items(), strict=True):
        y = np.array(one["factors"]) / scale
        ax.plot((np.arange(y.size) + 0.5) / y.size, y, color=colour, marker=marker, markersize=4, label=name)
    for member, style in zip(
        (m for m in RELEASED if "128k" in RELEASED[m].contexts), (":", "-.", (0, (5, 1)), "--"), strict=False
    ):
        model = published(member, "128k")
        if model.longrope and model.longrope.long:
            y = np.array(model.longrope.long) / (model.context / model.longrope.original_context)
            x = (np.arange(y.size) + 0.5) / y.size
            ax.plot(x, y, color="#5D3A9B", linestyle=style, linewidth=1.2, label=f"released {member}-128k")
    ax.set_xlabel("rotary pair, from the fastest (0) to the slowest (1)")
    ax.set_ylabel("factor / s")
    figure.legend(loc="outside right upper")
    return figure


def _looks(lists: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Colour and marker of each list; the model after training is black."""
    return _LOOKS[: len(lists)] if TRAINED not in lists else (*_LOOKS[: len(lists) - 1], _LOOKS[-1])


_NO_NEEDLES = (
    "Needles by depth and length: a search by text alone, of a model that cannot write needles evenly, asks for none"
)
_FIGURES = (
    ("position", "Loss by position",
     "Mean loss of text in bins of positions that double, on rows that no search saw, with every list.", _by_position),
    ("needles", "Needles by depth and length",
     "Share of a needle's digits that are right, in %, on questions that no search saw.", _needles),
    ("factors", "The factors",
     "By what each rotary pair's frequency is divided, over s, the target over the original length. The released lists "
     "have s = 32 from 4,096 tokens by their files, and go to twice that: they were made from 2,048.", _factors),
)  # fmt: skip


def _table(result: Result, found: Lists) -> str:
    """Every list in numbers."""
    lists, any_one = result["made_by"]["lists"], found["none"]
    head = [
        "list",
        "attention factor",
        "fitness",
        "beyond",
        *any_one["text"],
        *(f"digits at {n}" for n in any_one["digits"]),
    ]
    lines = []
    for name, one in found.items():
        own = lists.get(name)
        cells = [f"{own['attention_factor']:.3f}", f"{own['fitness']:.3f}"] if own else ["as found", "–"]
        cells += [f"{x:.3f}" for x in (one["beyond"], *one["text"].values())]
        lines.append(("", [name, *cells, *(f"{100 * x:.0f} %" for x in one["digits"].values())]))
    return markup.table(head, lines)


def _costs(made: Result) -> str:
    """Evaluations, time, tokens."""
    lines = [
        f"{made['evaluations']:,} evaluations of the fitness {made['fitness']}, {markup.duration(made['seconds'])} with "
        f"the evaluation of all lists; method {made['method']}, seed {made['seed']}, s = {made['s']:g} from L0 = "
        f"{made['L0']:,}",
        *(f"rows of the search ({name}): {digest}" for name, digest in made["rows"].items()),
    ]
    if trained := made.get("trained"):
        lines.append(
            f"{trained['tokens']:,} tokens of training, a share of {trained['mix']:g} of its rows of short documents"
        )
    return markup.items(map(markup.text, lines))


# ------------------------------------------------------------------------------------------------ the size study

# RULER's own table (arXiv:2404.06654 and its repository) of the released 128k models at these lengths.
RULER_AT = (4, 8, 16, 32, 64, 128)  # k
RULER = {"mini": (92.2, 91.5, 90.7, 87.5, 80.6, 66.7), "medium": (93.3, 93.2, 91.1, 86.8, 78.6, 46.1)}


def by_size(folder: Path, gaps: Mapping[Any, float], sizes: Mapping[str, int], of: str) -> list[Drawn]:
    """The size study's figure, SVG and PNG in `folder`; none where fewer than two sizes have a list in common.

    Args:
      gaps: (size, seed, list, trained) -> loss that the longer window adds, nats.
      sizes: size -> parameters without embeddings, smallest first.
      of: what was trained.
    """
    forms = list(dict.fromkeys(form for _, _, form, _ in gaps))
    if len({size for size, *_ in gaps}) < 2:
        return []
    folder.mkdir(exist_ok=True)
    with rc_context(STYLE):
        figure = sheet(4.4, of)
        *ours, published_ = figure.subplots(1, 3)
        for ax, trained in zip(ours, (False, True), strict=True):
            for (colour, marker), form in zip(_LOOKS, forms, strict=False):
                here = {
                    size: [v for (s, _, f, t), v in gaps.items() if (s, f, t) == (size, form, trained)]
                    for size in sizes
                }
                here = {size: values for size, values in here.items() if values}
                x, mean = [sizes[size] for size in here], [float(np.mean(values)) for values in here.values()]
                ax.plot(x, mean, color=colour, marker=marker, label=form)
                for size, values in here.items():
                    ax.plot([sizes[size]] * len(values), values, color=colour, marker=".", linestyle="", markersize=4)
            ax.set_xscale("log")
            ax.xaxis.set_minor_locator(NullLocator())
            ax.set_xticks(list(sizes.values()), [f"{size}\n{n / 1000:,.0f}k" for size, n in sizes.items()])
            ax.set_xlabel("size, parameters without embeddings")
            ax.set_title("trained in the long window" if trained else "not trained", loc="left")
        ours[0].set_ylabel("added loss, nats per token")
        for member, style in zip(RULER, ("o-", "s--"), strict=True):
            published_.plot(RULER_AT, RULER[member], style, color="#333333", label=f"phi-3-{member}-128k")
        published_.set_xscale("log")
        published_.xaxis.set_minor_locator(NullLocator())
        published_.set_xticks(RULER_AT, [f"{n}k" for n in RULER_AT])
        published_.set_xlabel("tokens of the input")
        published_.set_ylabel("RULER, %")
        published_.set_title("published", loc="left")
        published_.legend(loc="lower left")
        handles, labels = ours[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(forms))
        svg, png = (folder / f"longcontext-sizes.{kind}" for kind in ("svg", "png"))
        save(figure, svg, png)
    caption = (
        "Loss of text in the last half of the longer window, on rows that nobody trained on, less the loss of the same "
        "tokens in windows of the original length, by size and list: means over seeds, small dots are the seeds. A list "
        "that is bad in every window adds nothing. Right: RULER's own table of the released 128k models, another measure "
        "of other models."
    )
    return [Drawn("longcontext-sizes", "A longer window by size", caption, svg, png)]
