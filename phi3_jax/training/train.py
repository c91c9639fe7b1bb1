"""Trains one planned run: data, model, step, evaluation and folder put together."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from phi3_jax import chips, compile_cache, distributed
from phi3_jax.configs import RunConfig, fingerprint, science
from phi3_jax.data import loader, meters
from phi3_jax.data import manifest as manifests
from phi3_jax.data.gallery import tiles_per_token
from phi3_jax.errors import UserError
from phi3_jax.models.flops import train_flops_per_token, train_tile_flops
from phi3_jax.models.spec import param_specs
from phi3_jax.records import checkpoint, ownership
from phi3_jax.records.folder import DONE, own, refuse_other
from phi3_jax.records.goodput import Clock
from phi3_jax.sharding import feed, rules
from phi3_jax.sharding.mesh import mesh_of
from phi3_jax.training import pictures, reference, step
from phi3_jax.training.best import wanted
from phi3_jax.training.folder import describe, write_status
from phi3_jax.training.loop import LoopConfig, Result, fit
from phi3_jax.training.preference import preference
from phi3_jax.training.schedule import learning_rate

EVAL_TOKENS = 16384  # a batch of evaluation
ReadParams = Callable[[Any], Any]  # tree of shardings -> float32 parameters, laid out so; may raise UserError


_steps = functools.lru_cache(maxsize=2)(step.compile_steps)


def _compiled(run: RunConfig, loss: step.Loss) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Compiled steps, shared by the runs of a process that differ in length only."""
    same = dataclasses.replace(run, name="", steps=1, trunk_steps=0, start_step=0, parent=None, keep_steps=())
    same = dataclasses.replace(same, eval_points=0, checkpoint_every=0, seed=0, init="", init_content="")
    return _steps(same, loss)


def batches(
    ds: loader.Dataset, run: RunConfig, mesh: jax.sharding.Mesh, loss: step.Loss, folder: Path
) -> Callable[[int], dict[str, jax.Array]]:
    """Batch of a step, on the devices; this process reads the rows of its own."""
    count, shards = run.batch_windows, rules.row_shards(mesh)
    sharding = rules.batch_sharding(run.strategy, mesh)
    rows = feed.local_rows(sharding, (count, run.data.window))
    mine = np.unique(rows * shards // count)
    source = loader.train_batches(ds, count, run.seed, steps=run.steps, rows=rows)

    shown, parts = pictures.of(ds, run), ds.manifest["sources"]
    places = functools.cache(lambda: loader.records_of(ds, count, run.seed))
    kept = functools.cache(lambda: reference.read(folder))

    def get(number: int) -> dict[str, jax.Array]:
        local = source[number]
        if loss.objective.reference == "kept":
            sources, records = (x[rows] for x in places()(number))
            local["reference"] = reference.spread(kept(), sources, records, local["segments"])
        batch = {name: feed.place(x, rows, count, sharding) for name, x in local.items()}
        if loss.capacity:
            index = step.loss_index(local["domains"], len(mine), loss.capacity)
            batch["loss_index"] = feed.place(index, mine, shards, sharding)
        if shown:
            where = zip(*map(np.ndarray.tolist, places()(number)), strict=True)
            each = [shown.of(parts[source], record) for source, record in where]
            batch |= pictures.fields(shown, each, run, mesh, rows, run.accumulation)
        return batch

    return get


def loss_of(ds: loader.Dataset, run: RunConfig, mesh: jax.sharding.Mesh) -> step.Loss:
    """The batch's loss; logits only where a loss is, when at most 3/4 of the positions carry one."""
    if run.preference:
        return step.Loss(tuple(ds.manifest["domains"]), False, None, preference(run.preference))
    shards = rules.row_shards(mesh)
    positions = run.batch_windows * run.data.window // shards
    capacity = loader.max_targets(ds, run.batch_windows, shards)
    gathers = run.accumulation == 1 and mesh.size == shards and capacity <= 0.75 * positions
    by = run.weighting or manifests.weighting(ds.manifest)
    return step.Loss(
        tuple(ds.manifest["domains"]), by == "domain", capacity if gathers else None, per_token=by == "token"
    )


def evaluate(
    ds: loader.Dataset,
    run: RunConfig,
    mesh: jax.sharding.Mesh,
    eval_fn: Callable[..., Any],
    params: Any,
    last: bool = True,
) -> Iterator[dict[str, Any] | None]:
    """Rows of every evaluation set of a dataset, batched through the training forward, and None after each batch.

    Rows come on process 0 only. Before the `last` evaluation of a run none is free-running: it takes up to five times as
    many passes, in all 3 to 4 % of the time of a 4M-token run.
    """
    shards = rules.row_shards(mesh)
    per_batch = max(shards, EVAL_TOKENS // run.data.window // shards * shards)
    sharding, first = rules.batch_sharding(run.strategy, mesh), distributed.is_first()
    # Process 0, which scores, reads everything; the others what their devices need.
    mine = np.arange(per_batch) if first else feed.local_rows(sharding, (per_batch, run.data.window))

    shown, seen = pictures.of(ds, run), dict[str, jax.Array]()

    def forward(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        placed = {k: feed.place(v, mine, per_batch, sharding) for k, v in batch.items()}
        return feed.gather(eval_fn(params, placed | seen))

    for entry in ds.manifest["evals"]:
        meter, found, begin = meters.find(entry["meter"]), [], 0
        for batch, valid in loader.eval_batches(ds, entry["name"], per_batch, mine):
            if shown:
                each = [shown.of(entry, begin + i) for i in range(per_batch)]
                seen, begin = pictures.fields(shown, each, run, mesh, mine), begin + per_batch
            out = forward(batch)
            if meter.free and last:
                own = free_running(forward, batch, out, mine)
                out |= {"free": own["hit"], "reply": own["said"], "free_sure": own["sure"]}
            found.append({k: v[:valid] for k, v in (batch | out).items()})
            yield None
        if first:
            joined = {k: np.concatenate([b[k] for b in found]) for k in found[0]}
            yield from meters.measure(
                entry, joined, joined["nll"], joined["hit"], ds, run.model, joined.get("free"), joined.get("reply"),
                joined["sure"], joined.get("free_sure"),
            )  # fmt: skip


def free_running(
    forward: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]],
    batch: dict[str, np.ndarray],
    out: dict[str, np.ndarray],
    rows: np.ndarray,
) -> dict[str, np.ndarray]:
    """What `forward` gives where the model's own answers stand in the place of the right ones among the inputs.

    An input is an answer where the position before it, in the same segment, bears a loss. Nothing later is seen, so that
    after n passes the first n answers of every segment are those that word by word decoding gives; passes end when no
    input changes.

    Args:
      forward: `step.eval_step` of a batch of this process's `rows`, gathered: {nll, hit, said, ..}, each (batch, time).
      batch: {tokens, segments, domains, ...} (len(rows), time), with the right answers as inputs.
      out: of `forward(batch)`.
    """
    segments = batch["segments"]
    fed = np.pad((batch["domains"][:, :-1] > 0) & (segments[:, :-1] == segments[:, 1:]), ((0, 0), (1, 0)))
    while True:
        said = np.roll(out["said"][rows], 1, axis=1)  # a row's first input is none
        if not distributed.any_process(bool((fed & (said != batch["tokens"])).any())):
            return out
        batch = batch | {"tokens": np.where(fed, said, batch["tokens"]).astype(batch["tokens"].dtype)}
        out = forward(batch)


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


def _with_params(state: step.TrainState, read_params: ReadParams) -> step.TrainState:
    """The state with other parameters in the place of its own, which are freed first."""
    shardings = jax.tree.map(lambda x: x.sharding, state.params)
    jax.tree.map(lambda x: x.delete(), state.params)
    return dataclasses.replace(state, params=read_params(shardings))


def _eval_steps(run: RunConfig) -> tuple[int, ...]:
    """Evenly over the run; and at the start of one that does not start from random weights."""
    length = run.steps - run.start_step
    points = max(1, run.eval_points)
    start = {0} if run.init_content and not run.parent else set()
    return tuple(sorted(start | {run.start_step + round(length * (i + 1) / points) for i in range(points)}))


def train_run(
    run: RunConfig,
    study: Path,
    plan: Mapping[str, Any],
    *,
    read_params: ReadParams | None = None,
    read_adapters: ReadParams | None = None,
    forecast: str | None = None,
    resume: str = "auto",
    progress: Callable[[dict[str, Any]], None] | None = None,
    started: float | None = None,
    pause: int | None = None,
) -> Result:
    """Trains (or continues, or finds finished) one run of a study in `study/<run.name>`, to the step `pause` if given.

    `plan` is what the run is predicted to need, for plan.json; `forecast` the hash of a forecast that came before it, for
    config.json. `read_params` gives the parameters that a run with `init_content` starts from; it is called only where
    there is neither a checkpoint nor a trunk. In a run of adapters it gives the frozen parameters, at every start, and
    `read_adapters` the adapters that the run goes on with. `started` is the `time.monotonic()` at which the process
    began, now where absent.

    Raises:
      UserError: see `loop.fit`, `loader.open_dataset`, and a fork whose trunk is not there.
    """
    folder = study / run.name
    with contextlib.ExitStack() as stack:
        distributed.on_first(lambda: refuse_other(run, folder))
        distributed.on_first(lambda: stack.enter_context(own(folder)))
        description = functools.partial(describe, plan=plan, forecast=forecast)
        return _train(run, study, description, read_params, read_adapters, resume, progress, started, pause)


def _train(
    run: RunConfig,
    study: Path,
    write_description: Callable[..., None],
    read_params: ReadParams | None,
    read_adapters: ReadParams | None,
    resume: str,
    progress: Callable[[dict[str, Any]], None] | None,
    started: float | None,
    pause: int | None,
) -> Result:
    folder, given = study / run.name, bool(run.init_content and (run.lora or not run.parent))
    if given and read_params is None:
        raise ValueError(f"{run.name} starts from the weights {run.init_content}; hand in what reads them")
    cache = compile_cache.enable()
    mesh = mesh_of(run)
    clock = Clock(folder, started, write=distributed.is_first() and not (folder / DONE).exists())
    with clock, jax.set_mesh(mesh):
        ds = loader.open_dataset(manifests.beside(folder, dataclasses.asdict(run.data)))
        distributed.on_first(lambda: write_description(run, folder, ds))
        loss = loss_of(ds, run, mesh)
        train_step, eval_step = _compiled(run, loss)
        if run.lora:
            shardings = rules.param_shardings(param_specs(run.model), run.strategy, mesh)
            frozen = read_params(shardings) if read_params else None
            train_step, eval_step = (functools.partial(f, frozen=frozen) for f in (train_step, eval_step))
            read_params = read_adapters
        per_token = train_flops_per_token(run.model, run.data.window, lora=run.lora, parts=run.parts)
        per_token += tiles_per_token(ds.manifest) * train_tile_flops(run.model, run.lora, run.parts)
        chip = chips.of_device(jax.devices()[0].device_kind)
        loop = LoopConfig(
            steps=run.steps, tokens_per_step=run.tokens_per_step, flops_per_step=per_token * run.tokens_per_step,
            peak_flops=chip.peak_flops * mesh.size if chip else None, start=run.start_step, log_every=run.log_every,
            eval_steps=_eval_steps(run), checkpoint_every=run.checkpoint_every or None, keep_latest=run.keep_latest,
            batch_timeout=run.batch_timeout, keep_steps=run.keep_steps,
            profile=run.profile, tensorboard=run.tensorboard, pause=pause, best=wanted(ds.manifest),
        )  # fmt: skip

        def first_state(state: step.TrainState) -> step.TrainState:
            state = _with_params(state, read_params) if given and read_params and not run.parent else state
            if loss.objective.reference == "kept":
                reference.make(ds, run, mesh, eval_step, state.params, folder)
            return state

        result = fit(
            state=_initial(run, mesh, study),
            step_fn=train_step,
            lr_fn=lambda number: learning_rate(run, number),
            batch_fn=batches(ds, run, mesh, loss, folder),
            loop=loop,
            folder=folder,
            identity={"fingerprint": fingerprint(run), "order": loader.ORDER, "config": science(run)},
            eval_fn=lambda state, number: (
                row and {"budget": run.budget} | row
                for row in evaluate(ds, run, mesh, eval_step, state.params, number == run.steps)
            ),
            resume=resume,
            progress=functools.partial(_tell, progress, cache),
            clock=clock,
            guard=functools.partial(ownership.still_owned, folder, inside=True),
            start_from=first_state,
        )
    if distributed.is_first():
        write_status(folder, result)
    return result


def _tell(
    progress: Callable[[dict[str, Any]], None] | None, cache: compile_cache.CompileCache | None, row: dict[str, Any]
) -> None:
    if cache is not None:
        cache.publish()  # as soon as there is something: the process may be killed at any time
    if progress is not None:
        progress(row)
