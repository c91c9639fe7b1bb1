"""What the notebooks share: the reports' style for figures, a figure shown and kept as SVG, and a table."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIGURES = Path("figures")


def style() -> None:
    """Draws all further figures of this process as reports do."""
    import matplotlib

    from phi3_jax.reporting.figures import STYLE

    matplotlib.rcParams.update(STYLE)


def show(figure: Figure, name: str) -> None:
    """Displays a figure at 90 dpi and writes `figures/<name>.svg` beside the notebook."""
    from IPython.display import Image, display
    from matplotlib import rc_context

    from phi3_jax.reporting.figures import save

    FIGURES.mkdir(exist_ok=True)
    with rc_context({"svg.fonttype": "path"}):
        save(figure, FIGURES / f"{name}.svg")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=90)
    display(Image(png.getvalue()))


def table(header: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Displays rows of text as a table; the first column is left-aligned."""
    from IPython.display import HTML, display

    def row(cells: Sequence[object], tag: str) -> str:
        styles = ["text-align:left"] + ["text-align:right"] * (len(cells) - 1)
        inner = (f'<{tag} style="{s}">{html.escape(str(c))}</{tag}>' for c, s in zip(cells, styles, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "".join(row(line, "td") for line in lines)
    display(HTML(f"<table><thead>{row(header, 'th')}</thead><tbody>{body}</tbody></table>"))
