"""Trains one planned run: data, model, step, evaluation and folder put together.

As a program (`python -m phi3_jax.training.train STUDY RUN[@STEP]...`) it trains the named runs of a study one after the
other, up to a step where one is given, and prints one JSON object a line: {"run", ...progress}, {"run", "status"}, or
{"error"}.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax import distributed
from phi3_jax.cluster import end_with_parent
from phi3_jax.configs import RunConfig, fingerprint, science
from phi3_jax.data import loader
from phi3_jax.errors import UserError
from phi3_jax.evaluation import probes
from phi3_jax.planning import chips
from phi3_jax.scaling import forecast
from phi3_jax.scaling.flops import train_flops_per_token
from phi3_jax.sharding import feed, rules
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.study import run_from_dict
from phi3_jax.training import checkpoint, compile_cache, step
from phi3_jax.training.goodput import Clock, account
from phi3_jax.training.loop import DONE, LoopConfig, Result, config_diff, fit
from phi3_jax.training.optimizer import learning_rate

EVAL_TOKENS = 16384  # a batch of evaluation


@functools.lru_cache(maxsize=2)
def _steps(key: tuple[Any, ...], run_json: str, loss: step.Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiled steps, shared by the runs of a process that differ in length only."""
    del key
    return step.compile_steps(run_from_dict(json.loads(run_json)), loss)


def _compiled(run: RunConfig, loss: step.Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
    same = dataclasses.replace(run, name="", steps=1, trunk_steps=0, start_step=0, parent=None, keep_steps=())
    same = dataclasses.replace(same, eval_points=0, checkpoint_every=0, seed=0)
    return _steps((), json.dumps(dataclasses.asdict(same)), loss)


def _batches(
    ds: loader.Dataset, run: RunConfig, mesh: jax.sharding.Mesh, loss: step.Loss
) -> Callable[[int], dict[str, jax.Array]]:
    """Batch of a step, on the devices; this process reads the rows of its own."""
    count, shards = run.batch_windows, rules.row_shards(mesh)
    sharding = rules.batch_sharding(run.strategy, mesh)
    rows = feed.local_rows(sharding, (count, run.data.window))
    mine = np.unique(rows * shards // count)
    source = loader.train_batches(ds, count, run.seed, steps=run.steps, rows=rows)

    def get(number: int) -> dict[str, jax.Array]:
        local = source[number]
        batch = {name: feed.place(x, rows, count, sharding) for name, x in local.items()}
        if loss.capacity:
            index = step.loss_index(local["domains"], len(mine), loss.capacity)
            batch["loss_index"] = feed.place(index, mine, shards, sharding)
        return batch

    return get


def loss_of(ds: loader.Dataset, run: RunConfig, mesh: jax.sharding.Mesh) -> step.Loss:
    """The batch's loss; logits only where a loss is, when at most 3/4 of the positions carry one."""
    shards = rules.row_shards(mesh)
    positions = run.batch_windows * run.data.window // shards
    capacity = loader.max_targets(ds, run.batch_windows, shards)
    gathers = run.accumulation == 1 and mesh.size == shards and capacity <= 0.75 * positions
    manifest = ds.manifest
    return step.Loss(tuple(manifest["domains"]), manifest["loss"] == "domain_mean", capacity if gathers else None)


def evaluate(
    ds: loader.Dataset, run: RunConfig, mesh: jax.sharding.Mesh, eval_fn: Callable[..., Any], params: Any
) -> Iterator[dict[str, Any] | None]:
    """Rows of every evaluation set of a dataset, batched through the training forward, and None after each batch.

    Rows come on process 0 only.
    """
    shards = rules.row_shards(mesh)
    per_batch = max(shards, EVAL_TOKENS // run.data.window // shards * shards)
    sharding, first = rules.batch_sharding(run.strategy, mesh), distributed.is_first()
    # Process 0, which scores, reads everything; the others what their devices need.
    mine = np.arange(per_batch) if first else feed.local_rows(sharding, (per_batch, run.data.window))
    for entry in ds.manifest["evals"]:
        nll, hit, batches = [], [], []
        for batch, valid in loader.eval_batches(ds, entry["name"], per_batch, mine):
            out = feed.gather(eval_fn(params, {k: feed.place(v, mine, per_batch, sharding) for k, v in batch.items()}))
            nll.append(out["nll"][:valid])
            hit.append(out["hit"][:valid])
            batches.append({k: v[:valid] for k, v in batch.items()})
            yield None
        if not first:
            continue
        joined = {k: np.concatenate([b[k] for b in batches]) for k in batches[0]}
        yield from probes.measure(entry, joined, np.concatenate(nll), np.concatenate(hit), ds, run.model)


def _initial(run: RunConfig, mesh: jax.sharding.Mesh, study: Path) -> step.TrainState:
    """Fresh state, or for a fork the trunk's state at the fork point."""
    state = step.init_state(run, mesh)
    if run.parent is None:
        return state
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = checkpoint.restore(study / run.parent / "checkpoints", abstract, at_most=run.start_step)
    if found is None or found.step != run.start_step:
        raise UserError(
            f"{run.name} forks from step {run.start_step} of {run.parent}, whose checkpoint is missing; remove "
            f"{study / run.parent} to train it again"
        )
    return found.state


def _eval_steps(run: RunConfig) -> tuple[int, ...]:
    length = run.steps - run.start_step
    points = max(1, run.eval_points)
    return tuple(sorted({run.start_step + round(length * (i + 1) / points) for i in range(points)}))


def refuse_other(run: RunConfig, folder: Path) -> None:
    """Raises UserError, with what changed, when a run folder belongs to another experiment."""
    path = folder / "config.json"
    if not path.exists():
        return
    old = json.loads(path.read_text())
    if old["fingerprint"] == fingerprint(run):
        return
    changes = config_diff(old["identity"], science(run))
    more = f" and {len(changes) - 8} more" if len(changes) > 8 else ""
    raise UserError(
        f"{folder} holds another run; changed: {'; '.join(changes[:8])}{more}; choose another --workdir or "
        "--config.name, or put the config back"
    )


def _describe(run: RunConfig, folder: Path, on_cpu: bool, forecast_sha: str | None) -> None:
    """Writes config.json, with the hash of the study's forecast where it came first, and plan.json."""
    from phi3_jax.study import plan_of

    folder.mkdir(parents=True, exist_ok=True)
    plan = plan_of(run, on_cpu)
    tree = dataclasses.asdict(run)
    tree["budget"] = run.budget
    shared = {"non_embedding": plan["non_embedding"], "published_parameters": plan["published_parameters"]}
    tree["model"] |= shared
    record = {
        "fingerprint": fingerprint(run), "name": run.name, "label": run.model.label, "config": tree,
        "identity": science(run),
        "packages": packages(), "git_commit": _git_commit(), "device": jax.devices()[0].device_kind,
        "forecast": forecast_sha,
    }  # fmt: skip
    for name, content in (("config.json", record), ("plan.json", plan)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def packages() -> dict[str, str]:
    """Versions of what a run's numbers may depend on."""
    from importlib import metadata

    names = ("phi3_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    return {name: metadata.version(name) for name in names}


def _git_commit() -> str | None:
    import subprocess

    here = Path(__file__).resolve().parent
    done = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def train_run(
    run: RunConfig,
    study: Path,
    *,
    resume: str = "auto",
    progress: Callable[[dict[str, Any]], None] | None = None,
    started: float | None = None,
    pause: int | None = None,
) -> Result:
    """Trains (or continues, or finds finished) one run of a study in `study/<run.name>`, to the step `pause` if given.

    `started` is the `time.monotonic()` at which the process began, now where absent.

    Raises:
      UserError: see `loop.fit`, `loader.open_dataset`, and a fork whose trunk is not there.
    """
    folder = study / run.name
    distributed.on_first(lambda: refuse_other(run, folder))
    cache = compile_cache.enable()
    mesh = mesh_of(run)
    clock = Clock(folder, started, write=distributed.is_first() and not (folder / DONE).exists())
    with clock, jax.set_mesh(mesh):
        distributed.on_first(lambda: _describe(run, folder, jax.devices()[0].platform == "cpu", forecast.sha(study)))
        ds = loader.open_dataset(run.data.folder)
        loss = loss_of(ds, run, mesh)
        train_step, eval_step = _compiled(run, loss)
        per_token = train_flops_per_token(run.model, run.data.window)
        chip = chips.of_device(jax.devices()[0].device_kind)
        loop = LoopConfig(
            steps=run.steps, tokens_per_step=run.tokens_per_step, flops_per_step=per_token * run.tokens_per_step,
            peak_flops=chip.peak_flops * mesh.size if chip else None, start=run.start_step, log_every=run.log_every,
            eval_steps=_eval_steps(run), checkpoint_every=run.checkpoint_every or None, keep_latest=run.keep_latest,
            keep_every=run.keep_every or None, batch_timeout=run.batch_timeout, keep_steps=run.keep_steps,
            profile=run.profile, tensorboard=run.tensorboard, pause=pause,
        )  # fmt: skip
        result = fit(
            state=_initial(run, mesh, study),
            step_fn=train_step,
            lr_fn=lambda number: learning_rate(run, number),
            batch_fn=_batches(ds, run, mesh, loss),
            loop=loop,
            folder=folder,
            identity={"fingerprint": fingerprint(run), "config": science(run)},
            eval_fn=lambda state, _: (
                row and {"budget": run.budget} | row for row in evaluate(ds, run, mesh, eval_step, state.params)
            ),
            resume=resume,
            progress=functools.partial(_tell, progress, cache),
            clock=clock,
        )
    if distributed.is_first():
        _write_status(folder, result)
    return result


def _tell(
    progress: Callable[[dict[str, Any]], None] | None, cache: compile_cache.CompileCache | None, row: dict[str, Any]
) -> None:
    if cache is not None:
        cache.publish()  # as soon as there is something: the process may be killed at any time
    if progress is not None:
        progress(row)


def _write_status(folder: Path, result: Result) -> None:
    """status.json: how the run ended and what it took; times of several attempts add up."""
    path = folder / "status.json"
    old = json.loads(path.read_text()) if path.exists() else {}
    if old.get("status") == "done":
        return
    goodput = account(folder) or {"wall_s": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    status = {
        "status": result.status,
        "step": result.step,
        "seconds": goodput["wall_s"],
        "compile_s": result.compile_s if result.compile_s is not None else old.get("compile_s"),
        "first_step_s": result.first_step_s if result.first_step_s is not None else old.get("first_step_s"),
        "peak_bytes": max(peak, old.get("peak_bytes", 0)),
        "goodput": goodput,
    }
    path.write_text(json.dumps(status, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Worker process of a sweep; exit status 2 for a user's error, 0 also after SIGTERM."""
    end_with_parent()  # no worker trains on unseen
    study, names = Path(arguments[0]), arguments[1:]
    table = {r["name"]: r for r in json.loads((study / "study.json").read_text())["runs"]}
    started = float(os.environ.get("PHI3_JAX_STARTED", time.monotonic()))
    if hasattr(os, "sched_setaffinity") and (cores := os.environ.get("PHI3_JAX_CORES")):
        os.sched_setaffinity(0, map(int, cores.split(",")))  # before jax makes its thread pool

    def say(**row: Any) -> None:
        print(json.dumps(row, default=float), flush=True)

    for asked in names:
        name, _, pause = asked.partition("@")
        try:
            run = run_from_dict(table[name])
            result = train_run(
                run, study, resume=os.environ.get("PHI3_JAX_RESUME", "auto"), started=started,
                progress=functools.partial(lambda row, name: say(run=name, **row), name=name),
                pause=int(pause) if pause else None,
            )  # fmt: skip
        except UserError as error:
            say(run=name, error=str(error))
            return 2
        say(run=name, status=result.status, skipped_checkpoints=list(result.skipped_checkpoints))
        if result.status == "stopped":
            return 0
        started = time.monotonic()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
