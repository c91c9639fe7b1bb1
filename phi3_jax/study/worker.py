"""The process that trains some runs of a study.

`python -m phi3_jax.study.worker STUDY RUN[@STEP]...` trains the named runs one after the other, up to a step where one is
given, and prints one JSON object per line: {"run", ...progress}, {"run", "status"}, or {"error"}.
"""

from __future__ import annotations

if __name__ == "__main__":  # at the top: a signal during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("worker"))

import dataclasses
import functools
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from phi3_jax import cluster
from phi3_jax.configs import RunConfig, run_from_dict
from phi3_jax.data import manifest as manifests
from phi3_jax.data.gallery import tiles_per_token
from phi3_jax.errors import STOPPED, UserError
from phi3_jax.experiment import load_config
from phi3_jax.records.files import read_json
from phi3_jax.scaling import forecast
from phi3_jax.study import initial
from phi3_jax.study.runs import plan_of
from phi3_jax.training.loop import Result
from phi3_jax.training.train import train_run


def train(run: RunConfig, study: Path, **options: Any) -> Result:
    """`train_run` with what the study says of the run: its plan, and the hash of a forecast that came first."""
    seen = tiles_per_token(manifests.read(manifests.beside(study / run.name, dataclasses.asdict(run.data))))
    plan = plan_of(run, jax.devices()[0].platform == "cpu", seen)
    return train_run(
        run, study, plan, forecast=forecast.sha(study), read_params=initial.reader(run),
        read_adapters=initial.adapter_reader(run), **options,
    )  # fmt: skip


def main(flags: Mapping[str, Any]) -> int:
    """Worker process of a sweep; exit status 2 for a user's error, `STOPPED` after SIGTERM."""
    cluster.join()
    study, names = Path(flags["study"]), flags["runs"]
    described = read_json(study / "study.json")
    if file := described.get("experiment"):
        load_config(file)  # an experiment file may add to tables, such as a strategy
    table = {r["name"]: r for r in described["runs"]}
    started = float(os.environ.get("PHI3_JAX_STARTED", time.monotonic()))

    def say(**row: Any) -> None:
        print(json.dumps(row, default=float), flush=True)

    for asked in names:
        name, _, pause = asked.partition("@")
        try:
            run = run_from_dict(table[name])
            result = train(
                run, study, resume=os.environ.get("PHI3_JAX_RESUME", "auto"), started=started,
                progress=functools.partial(lambda row, name: say(run=name, **row), name=name),
                pause=int(pause) if pause else None,
            )  # fmt: skip
        except UserError as error:
            say(run=name, error=str(error))
            return 2
        say(run=name, status=result.status, skipped_checkpoints=list(result.skipped_checkpoints))
        if result.status == "stopped":
            return STOPPED
        started = time.monotonic()
    return 0
