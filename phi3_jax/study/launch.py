"""From a command line to a trained study: read the config, say what it is, train its runs, write the report."""

from __future__ import annotations

if __name__ == "__main__":  # at the top: a signal during the seconds that the imports below take finds a handler
    import sys

    from phi3_jax.entry import start

    sys.exit(start("launch"))

import contextlib
import dataclasses
import functools
import importlib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from phi3_jax import distributed
from phi3_jax.cluster import cluster
from phi3_jax.commands import Flags
from phi3_jax.configs import RunConfig, fingerprint
from phi3_jax.errors import STOPPED, Stopped, UserError
from phi3_jax.experiment import Command, asked, study_name
from phi3_jax.family import GIVEN, TRIO
from phi3_jax.planning import memory
from phi3_jax.records import ownership
from phi3_jax.records.files import read_state, require_writable, write_json, write_text
from phi3_jax.records.folder import ERROR, build, own, packages, refuse_other
from phi3_jax.records.table import keep_finished, kept
from phi3_jax.scaling import forecast
from phi3_jax.shipped import script
from phi3_jax.study import initial, stages
from phi3_jax.study import runs as studies
from phi3_jax.study.arms import parts
from phi3_jax.study.asked import asked_runs, select_runs
from phi3_jax.study.data import data_arguments, export_data
from phi3_jax.study.full import choose_scale, full_runs
from phi3_jax.study.workers import is_done, train_in_turn, train_side_by_side, unfinished
from phi3_jax.training import best

# ------------------------------------------------------------------------------------------------ the study


def main(flags: Flags) -> int:
    """Runs the command, of one process or several; exit status 0, 2 for an error of the user's, or `STOPPED`."""
    try:
        command = asked(flags)
        if job := cluster():
            distributed.start(job)
        line, status = shlex.join(["python", *script("run"), *flags.words]), 0
        for name, stage in (found := stages.of(command)).items():
            _say(*[f"stage {name}"] if name else [])
            distributed.on_first(functools.partial(stages.prepare, stage))
            status = launch(stage, line)
            if status:
                break
        else:
            _say(*(stages.summary(found) if "" not in found else ()))
    except (Exception, Stopped, KeyboardInterrupt) as error:
        status = distributed.fail(error)
    distributed.leave(status)
    return status


def _say(*text: str) -> None:
    if distributed.is_first():
        print(*text, sep="\n", flush=True)


def launch(command: Command, line: str) -> int:
    """Trains everything a command asks for and writes the report."""
    config = command.config
    full = full_runs(config)
    lines = [run.line for run in full]
    _say("The full run:" if full else "No released model is asked for.", *(f"  {x}" for x in lines))
    device = memory.device_bytes()
    scale, why = choose_scale(config, full, device)
    _say(why)
    folder = command.workdir or Path("runs") / study_name(config, scale)
    _agree_on(command, folder)
    content, told = distributed.from_first(lambda: initial.check(config, scale, folder))
    if told:
        _say(told)
    with _made(folder):
        data = _export_all(config, scale, folder)
        runs = studies.plan_study(config, scale, data, folder, device[1], content, device[0] == "CPU")
        chosen = select_runs(command.runs, asked_runs(config, scale), runs) if command.runs else _left(config, runs)
        distributed.agree("runs", {run.name: dataclasses.asdict(run) for run in runs})
        distributed.on_first(lambda: _refuse_others(chosen, folder))
    described = {
        "name": folder.name,
        "command": line,
        "experiment": command.experiment,
        "title": _title(config, scale),
        "full": [*lines, why],
        "design": {
            "scale": scale, "ladder": config.ladder, "data": {str(k): m["generator"] for k, m in data.items()},
            "config": config.to_dict(), "devices": device[1],
        },
        "runs": [dataclasses.asdict(run) for run in runs],
    }  # fmt: skip
    distributed.on_first(lambda: write_json(folder / "study.json", described))
    _say(*_power(config, runs))
    total = sum((r.steps - r.start_step) * r.tokens_per_step for r in chosen)
    _say(f"{len(chosen)} run{'s' * (len(chosen) != 1)}, {total:,} tokens, in {folder}")

    def ended() -> None:
        if config.get("rows"):
            keep_finished(folder, [run.name for run in runs], Path(config.rows))

    distributed.on_first(ended)
    with _owned(chosen, folder), _reasons(chosen, folder) as errors:
        alone = device[0] == "CPU" and not distributed.several()
        train = train_side_by_side if alone else train_in_turn
        first = None if command.runs else studies.before_forecast(runs)
        failed: list[str] = []
        stopped = False
        if first and not distributed.from_first(lambda: forecast.path(folder).exists()):
            failed, stopped = train(first[0], folder, command.resume, first[1], ended)
            if not failed and not stopped:
                held = [r for r in runs if r not in first[0] or r.name in first[1]]
                ahead = [forecast.Held(r.name, r.model.matrix_params, r.budget) for r in held]
                _say(*distributed.from_first(lambda: forecast.write(folder, ahead)))
        if not failed and not stopped:
            failed, stopped = train(chosen, folder, command.resume, {}, ended)
        errors += failed
    if (named := config.get("then")) and not (command.runs or errors or stopped):
        if distributed.several():
            raise UserError(f"{named} follows the runs in one process; start the study on one host")
        module, _, function = named.partition(":")
        failed, stopped = getattr(importlib.import_module(module), function)(folder, config.to_dict(), runs)
        errors += failed
    whole = not unfinished(runs, folder) if command.runs else not stopped
    if not distributed.is_first():
        return STOPPED if stopped else 0
    if whole or (not command.runs and any((folder / run.name / "evals.jsonl").exists() for run in runs)):
        from phi3_jax.reporting.page import write_report

        print(f"report: {write_report(folder)}")
        for named in filter(None, (best.line(folder / run.name) for run in runs)):
            print(named)
    if stopped:
        print("stopped; the same command goes on from here")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 2 if errors else STOPPED if stopped else 0


def _title(config: ConfigDict, scale: str) -> str:
    if scale == GIVEN:
        return f"{config.train.init}, trained further"
    return f"{'Phi-3' if scale == 'full' else f'{scale} proxies of Phi-3'}: {', '.join(config.sizes)}"


def _left(config: ConfigDict, runs: Sequence[RunConfig]) -> Sequence[RunConfig]:
    """Runs that do not stand in the study's table of rows yet, made elsewhere by this very code."""
    if not (rows := config.get("rows")):
        return runs
    there = set(map(tuple, distributed.from_first(lambda: sorted(kept(Path(rows), build())))))
    left = [run for run in runs if (run.name, fingerprint(run)) not in there]
    if len(left) < len(runs):
        _say(f"{len(runs) - len(left)} of {len(runs)} runs stand in {rows}, of this code, and are not trained again")
    return left


def _agree_on(command: Command, folder: Path) -> None:
    """Refuses processes that were started for different things, before anything is written."""
    same = {
        "config": command.config.to_dict(),
        "--workdir": str(folder),
        "--resume": command.resume,
        "--run": command.runs,
    }
    distributed.agree("configs", same | {"packages": packages()})


def _power(config: ConfigDict, runs: Sequence[RunConfig]) -> list[str]:
    """What a study with a rule can see, before it is paid for."""
    rule = config.get("rule")
    sizes = {r.model.member: r.model.matrix_params for r in runs if rule and r.arm == rule.arms[0]}
    if not set(TRIO) <= sizes.keys():
        return []
    if config.seeds < 2:
        return ["power: one seed shows the shape and tests nothing; seeds=3 or more give intervals"]
    from phi3_jax.scaling import power  # takes a second to import

    mini, small, medium = (sizes[m] for m in TRIO)
    items = 6 * round(config.universe * config.size_factor)
    return [power.line(power.Design((mini, small, medium), config.seeds, items, config.seed_sd, arms=2))]


def _export_all(config: ConfigDict, scale: str, folder: Path) -> dict[Path, dict[str, Any]]:
    """The manifests of a study's data, one for each place in it that its parts name."""
    arguments: dict[Path, tuple[Any, int]] = {}
    for part in parts(config, scale):
        largest = max(max(studies.budgets_of(part.config, scale, size)) for size in part.config.sizes)
        arguments[part.data] = part.config, max(largest, arguments.get(part.data, (None, 0))[1])
    return {
        place: _export(data_arguments(one, scale, largest), folder / place)
        for place, (one, largest) in arguments.items()
    }


def _export(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest of the dataset, which process 0 writes or finds and all read."""
    manifest = distributed.from_first(lambda: export_data(arguments, folder))
    path = folder / "manifest.json"
    if read_state(path) != manifest:
        raise UserError(
            f"{os.uname().nodename} does not see {folder}, which process 0 wrote; choose a --workdir on a file system "
            "that all hosts share"
        )
    return manifest


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """A context in which a study's folder is there; what is made here and still empty when it fails is removed."""
    new = [path for path in (folder, *folder.parents) if not os.path.lexists(path)] if distributed.is_first() else []
    distributed.on_first(lambda: require_writable(folder))
    try:
        yield
    except BaseException:
        inside = [Path(path) for path, *_ in os.walk(folder, topdown=False)][:-1] if new else []  # places for data sets
        for path in (*inside, *new):
            with contextlib.suppress(OSError):  # one that holds something
                path.rmdir()
        raise


def _refuse_others(runs: Sequence[RunConfig], folder: Path) -> None:
    """Refuses run folders of other experiments before anything is written."""
    for run in runs:
        refuse_other(run, folder / run.name)


# ------------------------------------------------------------------------------------------------ training


@contextlib.contextmanager
def _owned(runs: Sequence[RunConfig], folder: Path) -> Iterator[None]:
    """A context in which nobody else trains the unfinished of these runs; each worker takes over those that it trains.

    They are taken in one order, so that of two equal commands one gets all of them and the other none.
    """

    def take(run: RunConfig) -> None:
        stack.enter_context(own(folder / run.name))

    with ownership.shared_with_children(), contextlib.ExitStack() as stack:
        for run in unfinished(runs, folder):
            distributed.on_first(functools.partial(take, run))
        yield


@contextlib.contextmanager
def _reasons(runs: Sequence[RunConfig], folder: Path) -> Iterator[list[str]]:
    """Notes why training ended with errors in error.txt of the first unfinished run; a new start removes the note."""
    for run in runs:
        (folder / run.name / ERROR).unlink(missing_ok=True)
    errors: list[str] = []
    try:
        yield errors
    except UserError as error:
        errors.append(str(error))
        raise
    finally:
        left = [run for run in runs if not is_done(run, folder)]
        if errors and left:
            (folder / left[0].name).mkdir(exist_ok=True)
            write_text(folder / left[0].name / ERROR, "\n".join(errors) + "\n")
