"""The command: `python launch/curate.py --config experiments/curation.py --input FOLDER --output curated/mine`."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phi3_jax import commands, experiment
from phi3_jax.curation import config as configs
from phi3_jax.curation import page, phases, pipeline, synthetic_page, why
from phi3_jax.curation.engine import Engine
from phi3_jax.errors import UserError
from phi3_jax.statistics import wilson


def command(given: Mapping[str, Any]) -> None:
    """Curates, and prints what is left and what to look at.

    Raises:
      UserError: see `pipeline.curate`.
    """
    if given["why"] is not None:
        if given["output"] is None:
            raise UserError("--why needs --output, the folder of the curation")
        print(why.why(Path(given["output"]), given["why"]))
        return
    if given["config"] is None:
        raise UserError("--config is missing; for example --config experiments/curation.py")
    made = experiment.made(given["config"])
    for path, value in given[commands.OVERRIDES].items():
        experiment.override(made, path, value)
    config = made.to_dict()
    configs.steps_of(config)
    if "synthetic" in config:
        from phi3_jax.curation import synthetic

        manifest = synthetic.command(given, config)
        return finished(manifest, Path(given["output"] or synthetic.OUTPUT))
    if lost := [f"--{name}" for name in ("endpoint", "endpoint_model", "model") if given[name]]:
        raise UserError(f"{lost[0]} is for synthetic text; --config experiments/synthetic.py, or leave it out")
    inputs = [*given["input"], *given["more"]]
    if not inputs:
        raise UserError("--input is missing; name a file or a folder")
    if given["output"] is None and given["sample"] is None:
        raise UserError("--output is missing; name a folder, such as curated/mine")
    engine = Engine(given["engine"], given["workers"] or os.cpu_count() or 1)
    if given["sample"] is not None:
        print(forecast(config | {"sample": given["sample"]}, inputs, engine))
        return
    out = Path(given["output"])
    other = None if given["reuse"] is None else Path(given["reuse"])
    finished(pipeline.curate(config, inputs, out, engine, other), out)


def finished(manifest: Mapping[str, Any], out: Path) -> None:
    """Prints what is left, what to look at, and where the page is."""
    print(summary(manifest))
    for line in page.warnings(manifest):
        print(f"warning: {line}")
    print(f"report: {out / 'report.html'}")


def forecast(config: Mapping[str, Any], inputs: list[str], engine: Engine) -> str:
    """What each step would keep of everything, from a share of the documents drawn by id; nothing is written.

    A copy is seen only where the sample holds the other one too: what corpus rules drop is a least value.
    """
    with tempfile.TemporaryDirectory(prefix="phi3_jax_sample_") as folder:
        manifest = pipeline.curate(config, inputs, Path(folder) / "sample", engine)
    read = left = manifest["counts"]["read"]
    lines = [
        f"{read:,} documents, a share of {config['sample']:g}; with 95 % intervals",
        f"{'step':20} keeps of what it sees",
    ]
    for step in manifest["steps"]:
        kept = left - step["documents"]
        least = "  at most: copies outside the sample are not seen" if step["rule"] in ("exact", "near") else ""
        lines.append(f"{step['step']:20} {_share(kept, left)}{least}")
        left = kept
    return "\n".join([*lines, f"{'all':20} {_share(left, read)}"])


def _share(part: int, whole: int) -> str:
    low, high = wilson(part, whole)
    return f"{part / max(1, whole):>7.1%} [{low:.1%}, {high:.1%}]"


def summary(manifest: Mapping[str, Any]) -> str:
    """A line for each step, and the total."""
    total = manifest["counts"]
    left = total["read"]
    lines = [
        *synthetic_page.lines(manifest),
        f"{'read':20} {'':>10} {left:>12,} documents {total['tokens_read']:>15,} tokens",
    ]
    for step in manifest["steps"]:
        left -= step["documents"]
        lines.append(f"{step['step']:20} {-step['documents']:>10,} {left:>12,}")
    lines.append(f"{'kept':20} {'':>10} {total['kept']:>12,} documents {total['tokens_kept']:>15,} tokens")
    lines += filter(None, map(room, manifest["notes"].values()))
    if planned := phases.rows(manifest):
        lines += [" ".join(f"{cell:>13}" for cell in row) for row in [phases.HEADER, *planned]]
    return "\n".join(lines)


def room(note: Mapping[str, Any]) -> str:
    """What a knowledge filter gave room to; "" of another step's note."""
    if "budget" not in note:
        return ""
    return (
        f"facts: {note['facts']:,} of {note['bits']:,.0f} bits in {note['documents_with_facts']:,} documents; room for "
        f"{note['budget']:,.0f} bits at {note['parameters']:,} parameters"
    )
