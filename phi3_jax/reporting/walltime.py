"""The table of where each run's wall time went (goodput), as HTML with a bar per run (no jax)."""

from __future__ import annotations

import html
from collections.abc import Sequence

from phi3_jax.records.goodput import ACCOUNT, account
from phi3_jax.records.table import Run

COLOURS = dict(
    zip(ACCOUNT, ("#999999", "#E69F00", "#F0E442", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#CC79A7"), strict=True)
)
LABELS = {"data": "data wait"}


def wall_time_table(runs: Sequence[Run]) -> str:
    """HTML of the heading, a row for every run that left an account, and what the words mean; "" without any."""
    accounts = [(run.name, found) for run in runs if (found := account(run.folder)) and found["wall_s"]]
    if not accounts:
        return ""
    used = [name for name in ACCOUNT if any(found["seconds"][name] > 0 for _, found in accounts)]
    rows = []
    for run, found in accounts:
        shares = {name: max(0.0, found["seconds"][name]) / found["wall_s"] for name in used}
        bar = "".join(
            f'<i style="width:{share:.2%};background:{COLOURS[name]}" title="{_label(name)} {share:.1%}"></i>'
            for name, share in shares.items()
        )
        cells = [f"{found['wall_s']:,.1f} s", *(_percent(share) for share in shares.values())]
        cells += [str(found["attempts"]), f"{found['lost_steps']:,}"]
        rows.append(
            f'<tr><th>{html.escape(run)}</th><td><span class="bar">{bar}</span></td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    names = "".join(f'<th><i class="key" style="background:{COLOURS[n]}"></i>{_label(n)}</th>' for n in used)
    return (
        '<h3 id="goodput">Where the time went</h3><div class="scroll"><table><thead><tr><th>Run</th><th></th>'
        f"<th>wall time</th>{names}<th>attempts</th><th>steps lost</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        '</table></div><p class="small">Shares of the wall time of all attempts, without the time between them; '
        "phases that took none are left out. "
        "Start: from the start of the process to the first batch. Data wait: devices idle for want of a batch. Checkpoint: "
        "the part of a save that training waits for. Lost: work after the last whole checkpoint before a crash. "
        "Restarted: start and compile of the attempts after the first.</p>"
    )


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _percent(share: float) -> str:
    return "–" if share == 0 else "&lt;0.1%" if share < 0.0005 else f"{share:.1%}"
