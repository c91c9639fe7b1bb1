"""The page says where the time of every run went, also of runs that were killed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fake_study

from phi3_jax.records.goodput import PHASES
from phi3_jax.records.table import read_study
from phi3_jax.reporting.page import write_report
from phi3_jax.reporting.walltime import wall_time_table


def test_shares_of_a_killed_and_restarted_run_are_on_the_page(tmp_path: Path) -> None:
    folder = fake_study.write_study(tmp_path / "s", ("mini",), (4_000_000,))
    assert wall_time_table(read_study(folder).runs) == "", "no account, no table"
    (run,) = read_study(folder).runs
    first, second = (dict(zip(PHASES, values, strict=True)) for values in ((1, 2, 0, 3, 0, 0), (1, 1, 0, 2, 0, 0)))
    rows = [
        {"attempt": 1, "event": "pulse", "from": 0, "step": 7, "seconds": first},
        {"attempt": 2, "event": "end", "from": 0, "step": 9, "seconds": second},
    ]
    (run.folder / "goodput.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"attem')
    text = wall_time_table([run])
    assert text in write_report(folder).read_text()
    cells = re.findall(r"<td>([^<]*)</td>", text)
    assert cells == ["10.0 s", "10.0%", "20.0%", "20.0%", "30.0%", "20.0%", "2", "7"]
    widths = [float(width) for width in re.findall(r"width:([\d.]+)%", text)]
    assert sum(widths) == 100
    named = re.findall(r"</i>([^<]+)</th>", text)
    assert named == ["start", "compile", "step", "lost", "restarted"], "no column of a phase that took no time"
