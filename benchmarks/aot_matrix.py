"""Compiles the family's full training steps for TPU topologies, without one: `python benchmarks/aot_matrix.py`.

One row per model and topology, the compiler's memory and collectives and the plan's (`planning/aot.py`), into
analysis/results/aot_matrix.csv. Every row has a global batch of 4Mi tokens and float32 masters, bfloat16 products, full
rematerialisation. Rows already in the file are left; `--rows 0,4` does some. Needs the extra `[tpu]`; 2 to 6 minutes each.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.records import tables

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "analysis" / "results" / "aot_matrix.csv"
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16", "2xv5p:4x4x4")
# phi-3-mini-128k: each window over several chips. v5p has the memory to split heads only (the better balanced way).
LONG = {
    "v5e:16x16": ("--config.train.strategy=fsdp_cp", "--config.train.context=8"),
    "v5p:4x4x8": ("--config.train.strategy=fsdp_tp", "--config.train.tensor=4"),
    "v6e:16x16": ("--config.train.strategy=fsdp_cp", "--config.train.context=8"),
    "2xv5p:4x4x4": ("--config.train.strategy=fsdp_tp", "--config.train.tensor=4"),
}
ROWS = [(member, topology, ()) for member in ("mini", "small", "medium") for topology in TOPOLOGIES]
ROWS += [("mini", topology, ("--config.context=128k", *LONG[topology])) for topology in TOPOLOGIES]
# Fine-tuning on pictures: every window has one of 4 x 4 tiles and its whole view.
ROWS += [("vision", topology, ("--config.train.batch_tokens=4M",)) for topology in ("v5p:4x4x8", "v6e:16x16")]
STUDY = {"vision": "experiments/vision.py:sft,model=vision"}


def one(number: int) -> None:
    """Compiles a row and prints it as JSON; in a process of its own."""
    from phi3_jax.planning import aot
    from phi3_jax.study import plan
    from phi3_jax.verbs import asked

    member, topology, more = ROWS[number]
    study = STUDY.get(member, f"experiments/scaling.py:{member}")
    config = asked(["--config", f"{study},topology={topology}", *more]).config
    compiled = aot.compile_step(plan.plans(config)[0].configured.setup)
    versions = {"jax": metadata.version("jax"), "libtpu": metadata.version("libtpu")}
    print(json.dumps({"row": number} | compiled.record() | {"compile_s": round(compiled.seconds)} | versions))


def main(flags: Mapping[str, Any]) -> None:
    if flags["one"] is not None:
        one(flags["one"])
        return
    found, out = {}, Path(flags["out"] or OUT)
    if out.exists():
        with out.open() as file:
            found = {int(row["row"]): row for row in csv.DictReader(file)}
    for number in (n for n in flags["rows"] or range(len(ROWS)) if n not in found):
        done = subprocess.run(
            [sys.executable, __file__, "--one", str(number)], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            print(f"row {number} {ROWS[number][:2]}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", flush=True)
            continue
        found[number] = json.loads(done.stdout.strip().splitlines()[-1])
        print(found[number], flush=True)
        tables.write(out, list(found[number]), (found[n] for n in sorted(found)))


COMMAND = Command(
    "benchmarks/aot_matrix.py",
    __doc__,
    main,
    {
        "out": Flag(keys.local("the table; without, analysis/results/aot_matrix.csv"), "FILE"),
        "rows": Flag(
            keys.Key("numbers of rows; without, all", None, tuple, 1, item=keys.whole("a row", None, 0, len(ROWS) - 1))
        ),
        "one": Flag(keys.whole("", None), hidden=True),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
