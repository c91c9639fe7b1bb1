"""The command: `python launch/curate.py --config experiments/curation.py --input FOLDER --output curated/mine`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax import commands, experiment
from phi3_jax.curation import config as configs
from phi3_jax.curation import page, pipeline
from phi3_jax.curation.engine import Engine
from phi3_jax.errors import UserError


def command(given: Mapping[str, Any]) -> None:
    """Curates, and prints what is left and what to look at.

    Raises:
      UserError: see `pipeline.curate`.
    """
    made = experiment.made(given["config"])
    for path, value in given[commands.OVERRIDES].items():
        experiment.override(made, path, value)
    config = made.to_dict()
    configs.steps_of(config)
    inputs = [*given["input"], *given["more"]]
    if not inputs:
        raise UserError("--input is missing; name a file or a folder")
    if given["output"] is None:
        raise UserError("--output is missing; name a folder, such as curated/mine")
    out = Path(given["output"])
    engine = Engine(given["engine"], given["workers"] or os.cpu_count() or 1)
    manifest = pipeline.curate(config, inputs, out, engine)
    print(summary(manifest))
    for line in page.warnings(manifest):
        print(f"warning: {line}")
    print(f"report: {out / 'report.html'}")


def summary(manifest: Mapping[str, Any]) -> str:
    """A line for each step, and the total."""
    total = manifest["counts"]
    left = total["read"]
    lines = [f"{'read':20} {'':>10} {left:>12,} documents {total['tokens_read']:>15,} tokens"]
    for step in manifest["steps"]:
        left -= step["documents"]
        lines.append(f"{step['step']:20} {-step['documents']:>10,} {left:>12,}")
    lines.append(f"{'kept':20} {'':>10} {total['kept']:>12,} documents {total['tokens_kept']:>15,} tokens")
    return "\n".join(lines)
