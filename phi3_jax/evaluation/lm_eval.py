"""lm-eval's own command on a model of this package, with its flags, its seeds and its files.

    python -m phi3_jax.evaluation.lm_eval --model phi3_jax --model_args path=runs/phi3-mini --tasks arc_easy,gsm8k \
        --num_fewshot 5 --use_cache answers.jsonl --log_samples --output_path results

`--model_args` takes path (what `--model` of `phi3-jax evaluate` takes), adapter, and data_parallel_size=N, N devices with a
whole copy of the model on each. One flag is added: `--data_dir DIR`,
from which stock tasks read instead of the Hub, as in docs/evaluation.md. `--batch_size auto` takes, for each task, as many
rows at a time as fit the memory, 64 or `--max_batch_size` at most. `--use_cache FILE` keeps answers by token ids in
JSON lines, part by part, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phi3_jax import __version__
from phi3_jax.entry import run
from phi3_jax.errors import UserError, nearest

NAME = "phi3_jax"
MODEL_ARGS = ("path", "adapter", "data_parallel_size")


def main(words: Sequence[str]) -> int:
    """The command; words as lm-eval takes them."""
    data_dir, rest = _own(words)
    from phi3_jax.evaluation import stock

    stock.offline_at_once(data_dir is not None)
    config = _config(rest)
    if config.confirm_run_unsafe_code:
        raise UserError(
            "--confirm_run_unsafe_code would run model-written code without a sandbox; use phi3-jax evaluate --suite "
            "phi3_report --tasks humaneval,mbpp --allow_code_execution"
        )
    stock.seeded()
    tasks, manager = _tasks(config, data_dir)
    lm = _model(config)
    results, tracker = _results(config, lm, tasks, manager)
    _write(config, results, tracker, lm)
    return 0


def _tasks(config: Any, data_dir: str | None) -> tuple[list[Any], Any]:
    """(what is loaded, by whom); loaded once here, so that what is wrong is said before the model is read."""
    from phi3_jax.evaluation import stock

    asked = [name for text in config.tasks for name in text.split(",") if name]
    metadata = {name: value for name, value in config.metadata.items() if name not in MODEL_ARGS}
    manager = stock.manager_of(asked, metadata, config.include_path)
    names: list[str] = []
    for name in asked:
        found = [name] if stock.is_file(name) else manager.match_tasks([name])  # `mmlu_*` is many
        if not found:
            raise UserError(f"lm-eval has no task {name!r}; see lm-eval ls tasks")
        names += [match for match in found if match not in names]
    tasks = stock.specifications(names, None if data_dir is None else Path(data_dir), manager)
    try:
        manager.load(tasks)
    except UserError:
        raise
    except Exception as error:  # datasets, jinja and file systems each raise their own
        raise stock.unloadable(names, error) from error
    return tasks, manager


def _own(words: Sequence[str]) -> tuple[str | None, list[str]]:
    """(--data_dir, the words that are lm-eval's)."""
    folder, rest, left = None, [], list(words)
    while left:
        word = left.pop(0)
        name, _, value = word.partition("=")
        if name != "--data_dir":
            rest.append(word)
            continue
        folder = value or (left.pop(0) if left else "")
        if not Path(folder).is_dir() or not folder:
            raise UserError(f"--data_dir {folder} is no folder; give one that holds <benchmark>/test.jsonl")
    return folder, rest


def _config(words: Sequence[str]) -> Any:
    """lm-eval's own reading of its flags, and what a model of this package cannot do with them."""
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.config.evaluate_config import EvaluatorConfig
        from lm_eval.utils import setup_logging
    except ImportError as missing:
        raise UserError("evaluation needs lm-eval; pip install -e '.[eval]'") from missing
    setup_logging()
    flags = HarnessCLI()._parser.parse_args(["run", *words[words[:1] == ["run"] :]])
    flags.model = flags.model or NAME
    if flags.model != NAME:
        raise UserError(f"--model {flags.model}: this command runs {NAME}; other models are run by lm-eval itself")
    if not flags.model_args or "path" not in flags.model_args:
        raise UserError("--model_args path=MODEL missing: a run, or hf:FOLDER")
    for name in flags.model_args:
        if name not in MODEL_ARGS:
            raise UserError(f"--model_args has {name!r}{nearest(name, MODEL_ARGS)}")
    if not flags.tasks and not flags.config:
        raise UserError("--tasks missing; name tasks of lm-eval, or a task file")
    try:
        return EvaluatorConfig.from_cli(flags)
    except ValueError as error:
        raise UserError(str(error)) from error


def _model(config: Any) -> Any:
    from phi3_jax import checks
    from phi3_jax.evaluation import batches, harness
    from phi3_jax.evaluation.command import locate
    from phi3_jax.evaluation.copies import engine_of
    from phi3_jax.evaluation.kept import Kept
    from phi3_jax.interop import loading

    if not (size := str(config.batch_size)).isdecimal() and not size.startswith("auto"):
        raise UserError(f"--batch_size {size} is neither a number nor auto")
    batch = int(size) if size.isdecimal() else 1
    source = locate(config.model_args["path"], config.model_args.get("adapter"))
    devices = checks.integer(config.model_args.get("data_parallel_size", 1), "data_parallel_size", 1)
    engine = engine_of(loading.load(source.path, adapter=config.model_args.get("adapter")), batch, devices)
    cache = config.use_cache
    kept = Kept(Path(cache), f"{source.identity} {__version__} {engine.dtype}") if cache else Kept()
    seed = config.seed[0] if config.seed and config.seed[0] is not None else 0
    fit = None if size.isdecimal() else batches.fit(engine.config, engine.dtype, config.max_batch_size or batches.MOST)
    return harness.HarnessLM(engine, batch * devices, seed=seed, kept=kept, fit=fit)


def _results(config: Any, lm: Any, tasks: Sequence[Any], manager: Any) -> tuple[Any, Any]:
    """(results with samples, lm-eval's tracker, which writes them)."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from phi3_jax.evaluation import stock

    if config.output_path:
        config.hf_hub_log_args["output_path"] = config.output_path
    tracker = EvaluationTracker(**config.hf_hub_log_args)
    seeds = config.seed or [None] * 4
    names = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    same: tuple[str, ...] = (
        "num_fewshot",
        "limit",
        "samples",
        "check_integrity",
        "write_out",
        "log_samples",
        "system_instruction",
    )
    same += ("apply_chat_template", "fewshot_as_multiturn", "gen_kwargs", "predict_only", "metadata")
    options = {name: getattr(config, name) for name in same} | dict(zip(names, seeds, strict=True))
    options |= {"cache_requests": config.cache_requests.get("cache_requests", False)}
    options["log_samples"] = True  # prompts with conversations in place of their markers are made from them
    results = simple_evaluate(
        lm, model_args=config.model_args, tasks=list(tasks), batch_size=config.batch_size, device=config.device,
        task_manager=manager, evaluation_tracker=tracker, **options,
    )  # fmt: skip
    results["config"] |= {"model": NAME, "use_cache": config.use_cache}
    stock.readable_samples(results, lm.readable)
    return results, tracker


def _write(config: Any, results: Any, tracker: Any, lm: Any) -> None:
    from lm_eval.utils import make_table

    samples = results.pop("samples")
    tracker.general_config_tracker.model_source = NAME
    tracker.save_results_aggregated(results=results, samples=samples if config.log_samples else None)
    for task in samples if config.log_samples else ():
        tracker.save_results_samples(task_name=task, samples=samples[task])
    for what, count in lm.cut.items():
        if count:
            print(f"note: {count} {what} (context {lm.config.context})", file=sys.stderr)
    if lm.kept.taken:
        print(f"note: {lm.kept.taken} answers came from {config.use_cache}", file=sys.stderr)
    print(
        f"{NAME} ({config.model_args}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}, num_fewshot: "
        f"{config.num_fewshot}, batch_size: {config.batch_size}"
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(run(sys.argv[1:], main))
