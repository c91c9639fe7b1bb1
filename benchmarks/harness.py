"""CPU seconds of lm-eval's stock tasks, beside lm-eval's own Hugging Face backend on the same weights.

    python benchmarks/harness.py --data_dir DATA --tokenizer FOLDER [--limit 0] [--scale milli] [--batch 8] [--groups ..]

DATA is what `evaluate --data_dir` takes, with the Hub's columns in DATA/<benchmark>/hf; FOLDER holds tokenizer.json and
tokenizer_config.json. The model is a proxy of mini with random weights, written as a folder that both sides read
(`pip install -e '.[eval,trl]'`). Groups are `0 shots` (nine tasks), `5 shots` (three) and `replies` (gsm8k, 64 new tokens).
Each side runs in a process of its own on one core. Only the calls of the model are counted, as lm-eval makes the prompts of
both. `cold` is the first pass, with every compilation; `warm` the second one of the same process. Log-likelihoods and
replies of the two are compared.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.errors import UserError
from phi3_jax.family import SCALES

GROUPS: dict[str, tuple[tuple[str, ...], int | None, str | None]] = {
    "0 shots": (
        (
            "arc_easy", "arc_challenge", "boolq", "hellaswag", "mmlu_anatomy", "openbookqa", "piqa", "truthfulqa_mc2",
            "winogrande",
        ),
        0,
        None,
    ),
    "5 shots": (("hellaswag", "mmlu_anatomy", "winogrande"), 5, None),
    "replies": (("gsm8k",), 3, "max_gen_toks=64"),
}  # fmt: skip
SIDES = ("phi3_jax", "hf")


def make(folder: Path, scale: str, tokenizer: Path) -> None:
    """A model's folder with random weights and the tokenizer."""
    import numpy as np

    from phi3_jax import proxy
    from phi3_jax.interop import hf_config, huggingface
    from phi3_jax.models.spec import init_params, named
    from phi3_jax.records.files import write_json

    cfg = proxy("mini", scale, "clean", vocab=32064, context=4096)
    values = {name: np.asarray(x, np.float32) for name, x in named(init_params(cfg, 0)).items()}
    random = np.random.default_rng(1)  # it starts as zeros, and all logits would be equal
    values["unembedding"] = 0.1 * random.standard_normal(values["unembedding"].shape, np.float32)
    write_json(folder / "config.json", hf_config.to_config(cfg, "float32"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    dtypes = dict.fromkeys(values, np.dtype(np.float32))
    huggingface.write_params(
        folder, cfg, dtypes, lambda leaf, layer: values[leaf] if layer is None else values[leaf][layer]
    )


def asker(side: str, folder: str, batch: int) -> Callable[[], Any]:
    """What lm-eval asks, made anew at each call, of the same model: it keeps no answers of an earlier pass."""
    if side == "hf":
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(1)
        lm = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=batch)
        return lambda: lm
    from phi3_jax.evaluation import harness
    from phi3_jax.evaluation.copies import engine_of
    from phi3_jax.interop import loading

    engine = engine_of(loading.load(f"hf:{folder}"), batch, 1)
    return lambda: harness.HarnessLM(engine, batch)


def counted(call: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """The same call, whose CPU seconds are added to `spent`."""

    def timed(*given: Any, **named: Any) -> Any:
        start = time.process_time()
        try:
            return call(*given, **named)
        finally:
            spent[0] += time.process_time() - start

    return timed


def one(side: str, folder: str, flags: Mapping[str, Any]) -> None:
    """A side: prints {group: {cold, warm, answers}} as JSON."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    from phi3_jax.evaluation import stock

    stock.offline_at_once(True)
    from lm_eval import simple_evaluate

    ask, found = asker(side, folder, flags["batch"]), {}
    for group in flags["groups"]:
        names, shots, more = GROUPS[group]
        row: dict[str, Any] = {}
        for state in ("cold", "warm"):
            manager = stock.manager_of(list(names), {}, None)
            tasks = stock.specifications(names, Path(flags["data_dir"]), manager)
            lm, spent = ask(), [0.0]
            calls = {name: getattr(lm, name) for name in ("loglikelihood", "generate_until")}
            for name, call in calls.items():
                setattr(lm, name, counted(call, spent))
            results = simple_evaluate(
                lm, tasks=tasks, task_manager=manager, num_fewshot=shots, limit=flags["limit"] or None, gen_kwargs=more,
                bootstrap_iters=0, random_seed=0, numpy_random_seed=1234, torch_random_seed=1234, fewshot_random_seed=1234,
            )  # fmt: skip
            row[state] = spent[0]
            for name, call in calls.items():
                setattr(lm, name, call)
        row["answers"] = []
        for task in sorted(results["samples"]):
            once = {
                sample["doc_id"]: sample["resps"] for sample in results["samples"][task]
            }  # it is there for each filter
            row["answers"] += [answer[0] for doc in sorted(once) for answer in once[doc]]
        found[group] = row
    print("\n" + json.dumps(found, default=str))


def compared(ours: Sequence[Any], theirs: Sequence[Any]) -> str:
    """How far answers are apart."""
    pairs = list(zip(ours, theirs, strict=True))
    if isinstance(ours[0], str):
        return f"{sum(a.strip() == b.strip() for a, b in pairs)} of {len(pairs)} texts are the same"
    return f"{max(abs(float(a[0]) - float(b[0])) for a, b in pairs):.0e} nats"


def main(flags: Mapping[str, Any]) -> None:
    if flags["side"]:
        return one(flags["side"], flags["folder"], flags)
    for name in ("data_dir", "tokenizer"):
        if not Path(flags[name] or "missing").is_dir():
            raise UserError(f"--{name} {flags[name]!r} is no folder")
    with tempfile.TemporaryDirectory() as work:
        make(Path(work), flags["scale"], Path(flags["tokenizer"]))
        found: dict[str, Any] = {}
        for side in SIDES:
            words = [sys.executable, __file__, "--side", side, "--folder", work, "--data_dir", str(flags["data_dir"])]
            words += [
                "--limit",
                str(flags["limit"]),
                "--batch",
                str(flags["batch"]),
                "--groups",
                ",".join(flags["groups"]),
            ]
            alone = os.environ | {
                "OMP_NUM_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "LMEVAL_LOG_LEVEL": "ERROR",
            }
            done = subprocess.run(words, env=alone, stdout=subprocess.PIPE, text=True, check=True)
            found[side] = json.loads(done.stdout.splitlines()[-1])
    print("| group | requests | phi3_jax cold | warm | HF cold | warm | ratio cold | warm | apart |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for group in flags["groups"]:
        ours, theirs = (found[side][group] for side in SIDES)
        cells = [f"{x:.1f} s" for side in (ours, theirs) for x in (side["cold"], side["warm"])]
        cells += [f"{theirs[state] / ours[state]:.2f}x" for state in ("cold", "warm")]
        apart = compared(ours["answers"], theirs["answers"])
        print(f"| {' | '.join([group, str(len(ours['answers'])), *cells, apart])} |", flush=True)


COMMAND = Command(
    "benchmarks/harness.py",
    __doc__,
    main,
    {
        "data_dir": Flag(keys.local("folder of benchmarks", "")),
        "tokenizer": Flag(keys.local("folder of a tokenizer", "")),
        "limit": Flag(keys.whole("questions a task; 0: all", 0, 0)),
        "scale": Flag(keys.word("of the proxy of mini", "milli", *SCALES)),
        "batch": Flag(keys.whole("rows of one call", 8, 1)),
        "groups": Flag(keys.Key("which to time", tuple(GROUPS), tuple, 1, item=keys.word("a group", None, *GROUPS))),
        "side": Flag(keys.word("", None, *SIDES), hidden=True),
        "folder": Flag(keys.local("", ""), hidden=True),
    },
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
