"""From a command line to a trained study: read the config, say what it is, train its runs, write the report."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from phi3_jax import distributed
from phi3_jax import study as studies
from phi3_jax.cluster import STOPPED, cluster
from phi3_jax.configs import RunConfig
from phi3_jax.errors import UserError, nearest
from phi3_jax.planning import memory
from phi3_jax.scaling import forecast

OPTIONS = ("--config", "--workdir", "--resume", "--run")
ERROR = "error.txt"  # in a run's folder: why its last start failed
# XLA:CPU asks malloc for a step's buffers and frees them after it. glibc's defaults give such blocks back to the kernel, so
# that every step faults its memory in anew, 4 KiB at a time; these keep it, in huge pages. Other C libraries ignore them.
MALLOC = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1, "mmap_max": 0, "trim_threshold": 2**40, "top_pad": 64 * 2**20, "arena_max": 1,
    }.items()
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ command line


@dataclasses.dataclass
class Command:
    """The parsed command line."""

    config: ConfigDict
    experiment: str
    workdir: Path | None
    resume: str
    overrides: tuple[str, ...] = ()  # as typed: a.b=VALUE
    runs: tuple[str, ...] = ()  # train only these


def parse(arguments: Sequence[str]) -> Command:
    """Reads `--config FILE[:WORDS] [--config.a.b=v ...] [--workdir DIR] [--resume auto|never] [--run NAME,...]`."""
    values, overrides, queue = {}, [], list(arguments)
    while queue:
        key, equals, value = queue.pop(0).partition("=")
        if not (key in OPTIONS or key.startswith("--config.")):
            raise UserError(f"unknown option {key!r}{nearest(key, OPTIONS)}")
        if not equals:
            if not queue or queue[0].startswith("--"):
                raise UserError(f"option {key} needs a value")
            value = queue.pop(0)
        if key in OPTIONS:
            values[key] = value
        else:
            overrides.append((key.removeprefix("--config."), value))
    if "--config" not in values:
        raise UserError("--config is missing; for example --config experiments/scaling.py")
    runs = tuple(filter(None, values.get("--run", "").split(",")))
    if "--run" in values and not runs:
        raise UserError("--run needs names of runs, for example --run mini-s0-4M")
    if values.get("--resume", "auto") not in ("auto", "never"):
        raise UserError(f"--resume {values['--resume']!r}; valid: auto, never")
    config = load_config(values["--config"])
    for path, value in overrides:
        override(config, path, value)
    workdir = Path(values["--workdir"]) if "--workdir" in values else None
    typed = tuple(f"{path}={value}" for path, value in overrides)
    return Command(config, values["--config"], workdir, values.get("--resume", "auto"), typed, runs)


def load_config(text: str) -> ConfigDict:
    """The ConfigDict of `FILE[:WORDS]`: the file's `get_config(WORDS)`."""
    file, _, words = text.partition(":")
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no experiment file {file!r}; run from the repository's root, e.g. experiments/scaling.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{file} has no get_config(argument)")
    return module.get_config(words)


def override(config: ConfigDict, path: str, text: str) -> None:
    """Sets one field from text, in the field's own type."""
    *parents, last = path.split(".")
    node = config
    for i, part in enumerate(parents):
        if part not in node or not isinstance(node[part], ConfigDict):
            known = [k for k in node if isinstance(node[k], ConfigDict)]
            raise UserError(f"unknown section config.{'.'.join(parents[: i + 1])}{nearest(part, known)}")
        node = node[part]
    if last not in node or isinstance(node[last], ConfigDict):
        raise UserError(f"unknown field config.{path}{nearest(last, [k for k in node])}")
    kind = node.get_type(last)
    try:
        if kind is bool:
            value: Any = {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        elif kind is int:
            value = int(text) if text.lstrip("-").isdigit() else studies.parse_count(text)
        elif kind is tuple:
            sample, pieces = node[last], [p for p in text.strip("()").split(",") if p]
            numeric = studies.parse_count if last == "budgets" else type(sample[0]) if sample else str
            value = tuple(numeric(p.strip()) for p in pieces)
        else:
            value = kind(text)
    except (ValueError, KeyError) as error:
        raise UserError(f"config.{path}={text!r} is not of type {kind.__name__}") from error
    node[last] = value


# ------------------------------------------------------------------------------------------------ the study


def study_name(config: ConfigDict, scale: str) -> str:
    """Folder name: what was asked for, in words that are safe in a path."""
    if config.name:
        return config.name
    parts = ["sweep" if len(config.sizes) > 1 else config.sizes[0], scale]
    if scale != "full":
        parts.append(config.ladder)
    source = config.data.source
    if source not in ("", "facts"):
        parts.append("".join(c if c.isalnum() else "-" for c in Path(source).name).strip("-"))
    if config.tokens != "matched":
        parts.append(f"tokens-{config.tokens}")
    return "-".join(parts)


def main(arguments: Sequence[str], usage: str = "") -> int:
    """Runs the command; prints errors as one line. Exit status 0, 2 for an error of the user's, or `STOPPED`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage)
        return 0
    try:
        command = parse(arguments)
        if job := cluster():
            distributed.start(job)
        status = launch(command, shlex.join(["python", "launch/run.py", *arguments]))
    except Exception as error:
        status = distributed.fail(error)
    distributed.leave(status)
    return status


def _say(*text: str) -> None:
    if distributed.is_first():
        print(*text, sep="\n", flush=True)


def launch(command: Command, line: str) -> int:
    """Trains everything a command asks for and writes the report."""
    config = command.config
    full = studies.full_runs(config)
    lines = [run.line for run in full]
    _say("The full run:" if full else "No released model is asked for.", *(f"  {x}" for x in lines))
    device = memory.device_bytes()
    scale, why = studies.choose_scale(config, full, device)
    _say(why)
    folder = command.workdir or Path("runs") / study_name(config, scale)
    _agree_on(command, folder)
    distributed.on_first(lambda: _make(folder))
    data = _export_all(config, scale, folder)
    runs = studies.plan_study(config, scale, data, folder, device[1])
    chosen = studies.select_runs(command.runs, studies.asked_runs(config, scale), runs) if command.runs else runs
    distributed.agree("runs", {run.name: dataclasses.asdict(run) for run in runs})
    distributed.on_first(lambda: _refuse_others(chosen, folder))
    described = {
        "name": folder.name,
        "command": line,
        "title": f"{'Phi-3' if scale == 'full' else f'{scale} proxies of Phi-3'}: {', '.join(config.sizes)}",
        "full": [*lines, why],
        "design": {
            "scale": scale, "ladder": config.ladder, "data": {str(k): m["generator"] for k, m in data.items()},
            "config": config.to_dict(), "devices": device[1],
        },
        "runs": [dataclasses.asdict(run) for run in runs],
    }  # fmt: skip
    text = json.dumps(described, indent=1, default=list) + "\n"
    distributed.on_first(lambda: _write(folder / "study.json", text))
    _say(*_power(config, runs))
    total = sum((r.steps - r.start_step) * r.tokens_per_step for r in chosen)
    _say(f"{len(chosen)} run{'s' * (len(chosen) != 1)}, {total:,} tokens, in {folder}")
    with _reasons(chosen, folder) as errors:
        alone = device[0] == "CPU" and not distributed.several()
        train = _train_side_by_side if alone else _train_in_turn
        first = None if command.runs else studies.before_forecast(runs)
        failed, stopped = [], False
        if first and not distributed.from_first(lambda: forecast.path(folder).exists()):
            failed, stopped = train(first[0], folder, command.resume, first[1])
            if not failed and not stopped:
                held = [r for r in runs if r not in first[0] or r.name in first[1]]
                asked = [forecast.Held(r.name, r.model.matrix_params, r.budget) for r in held]
                _say(*distributed.from_first(lambda: forecast.write(folder, asked)))
        if not failed and not stopped:
            failed, stopped = train(chosen, folder, command.resume, {})
        errors += failed
    whole = not _unfinished(runs, folder) if command.runs else not stopped
    if not distributed.is_first():
        return STOPPED if stopped and command.runs else 0
    if whole or (not command.runs and any((folder / run.name / "evals.jsonl").exists() for run in runs)):
        from phi3_jax.reporting.page import write_report

        print(f"report: {write_report(folder)}")
    if stopped:
        print("stopped; the same command goes on from here")
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if stopped and command.runs:
        return STOPPED
    return 2 if errors else 0


def _agree_on(command: Command, folder: Path) -> None:
    """Refuses processes that were started for different things, before anything is written."""
    from phi3_jax.training.train import packages

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
    if not {"mini", "small", "medium"} <= sizes.keys():
        return []
    if config.seeds < 2:
        return ["power: one seed shows the shape and tests nothing; seeds=3 or more give intervals"]
    from phi3_jax.scaling import power  # takes a second to import

    trio = tuple(sizes[m] for m in ("mini", "small", "medium"))
    items = 6 * round(config.universe * config.size_factor)
    return [power.line(power.Design(trio, config.seeds, items, config.seed_sd, arms=2))]


def _export_all(config: ConfigDict, scale: str, folder: Path) -> dict[Path, dict[str, Any]]:
    """The manifests of a study's data, one for each place in it that its arms name."""
    arguments: dict[Path, tuple[Any, int]] = {}
    for arm in studies.arms(config, scale):
        largest = max(max(studies.budgets_of(arm.config, scale, size)) for size in arm.config.sizes)
        arguments[arm.data] = arm.config, max(largest, arguments.get(arm.data, (None, 0))[1])
    return {
        place: _export(studies.data_arguments(one, scale, largest), folder / place)
        for place, (one, largest) in arguments.items()
    }


def _export(arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The manifest of the dataset, which process 0 writes or finds and all read."""
    manifest = distributed.from_first(lambda: studies.export_data(arguments, folder))
    path = folder / "manifest.json"
    if not path.exists() or json.loads(path.read_text()) != manifest:
        raise UserError(
            f"{os.uname().nodename} does not see {folder}, which process 0 wrote; choose a --workdir on a file system "
            "that all hosts share"
        )
    return manifest


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{_process()}.writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --workdir") from error


def _process() -> str:
    """A name no other process has: several jobs of a study may write to its folder at a time."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{_process()}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def _refuse_others(runs: Sequence[RunConfig], folder: Path) -> None:
    """Refuses run folders of other experiments before anything is written."""
    from phi3_jax.training.train import refuse_other

    for run in runs:
        refuse_other(run, folder / run.name)


# ------------------------------------------------------------------------------------------------ training


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
        left = [run for run in runs if not _is_done(run, folder)]
        if errors and left:
            (folder / left[0].name).mkdir(exist_ok=True)
            _write(folder / left[0].name / ERROR, "\n".join(errors) + "\n")


def _is_done(run: RunConfig, folder: Path) -> bool:
    from phi3_jax.training.loop import DONE

    return (folder / run.name / DONE).exists()


def _unfinished(runs: Sequence[RunConfig], folder: Path) -> list[RunConfig]:
    done = distributed.from_first(lambda: [run.name for run in runs if _is_done(run, folder)])
    return [run for run in runs if run.name not in done]


def _train_in_turn(
    runs: Sequence[RunConfig], folder: Path, resume: str, pauses: Mapping[str, int]
) -> tuple[list[str], bool]:
    """One run after the other on all attached devices; `pauses` are steps that runs stop at for now."""
    from phi3_jax.training.metrics import ProgressBars
    from phi3_jax.training.train import train_run

    bars, rows = ProgressBars(), {}
    for group in studies.groups(_unfinished(runs, folder)):
        for run in group:

            def show(row: dict[str, Any], name: str = run.name) -> None:
                rows[name] = row
                bars.show(rows)

            show = show if distributed.is_first() else None
            result = train_run(run, folder, resume=resume, progress=show, pause=pauses.get(run.name))
            if result.status == "stopped":
                return [], True
    return [], False


class _Worker:
    """One process that trains a group of runs on one core (or on all, when it is alone)."""

    def __init__(
        self, group: Sequence[RunConfig], folder: Path, resume: str, cores: set[int], pauses: Mapping[str, int]
    ) -> None:
        self.names, self.cores = [run.name for run in group], cores
        asked = [f"{name}@{pauses[name]}" if name in pauses else name for name in self.names]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", MALLOC),
            # LLVM's first level compiles a third faster than its third; the programs are as fast.
            "XLA_FLAGS": f"--xla_backend_optimization_level=1 {os.environ.get('XLA_FLAGS', '')}",
            "PHI3_JAX_STARTED": str(time.monotonic()),  # one clock for all processes of a machine
            "PHI3_JAX_RESUME": resume,
            "PHI3_JAX_CORES": ",".join(map(str, sorted(cores))),
        }
        self.log = (folder / f"{self.names[0]}.log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "phi3_jax.training.train", str(folder), *asked],
            stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self.progress: dict[str, dict[str, Any]] = {}
        self.errors: list[str] = []
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            message = json.loads(line) if line.startswith("{") else {}
            if "steps" in message:
                self.progress[message["run"]] = message
            elif "error" in message:
                self.errors.append(f"{message['run']}: {message['error']}")
            for skipped in message.get("skipped_checkpoints", ()):
                print(f"warning: {skipped}", file=sys.stderr)

    def finish(self) -> list[str]:
        """Errors of an ended process."""
        self.thread.join()
        self.log.close()
        if self.process.returncode and not self.errors:
            self.errors.append(
                f"{self.names[0]}: the training process ended with status {self.process.returncode}; "
                f"see {self.log.name}"
            )
        if not self.errors:
            Path(self.log.name).unlink(missing_ok=True)
        return self.errors


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _train_side_by_side(
    runs: Sequence[RunConfig], folder: Path, resume: str, pauses: Mapping[str, int]
) -> tuple[list[str], bool]:
    """One pinned process a core, costliest group first: on CPU this beats one process with all threads."""
    from phi3_jax.training.metrics import ProgressBars

    queue, free = studies.groups(_unfinished(runs, folder)), [{core} for core in _cores()]
    if len(queue) == 1:
        free = [set(_cores())]
    workers: list[_Worker] = []
    errors: list[str] = []
    stop, told = threading.Event(), False
    handlers = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGTERM, signal.SIGINT)}
    bars, rows = ProgressBars(), {}
    try:
        while queue or workers:
            if stop.is_set() and not told:
                told = True  # once: a second signal would cut the saving short
                queue.clear()
                for worker in workers:
                    worker.process.terminate()
            while queue and free:
                workers.append(_Worker(queue.pop(0), folder, resume, free.pop(), pauses))
            for worker in list(workers):
                rows |= worker.progress
                if worker.process.poll() is not None:
                    errors += worker.finish()
                    rows |= worker.progress
                    workers.remove(worker)
                    free.append(worker.cores)
            bars.show(rows)
            stop.wait(0.3) if not stop.is_set() else time.sleep(0.3)
    finally:
        for s, handler in handlers.items():
            signal.signal(s, handler)
    return errors, stop.is_set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
