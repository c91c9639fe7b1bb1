"""Import and export compared with a plain copy: `python benchmarks/convert.py [--member mini] [--layers N] [--folder DIR]`.

Makes a Hugging Face folder of the member's true shape with random bfloat16 weights, then times, each in a process of its
own: a plain copy of its files (synced to the disk), import to a run, export back, and `phi3_jax.load` of both. Prints
seconds, the ratio to the plain copy, and the peak of resident memory over the parameters' bytes. Checks that what comes
back is bitwise what went in. Needs four times the model's bytes on the disk, 31 GB for mini.
"""

from __future__ import annotations

import dataclasses
import filecmp
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag
from phi3_jax.family import published
from phi3_jax.interop import hf_config, huggingface, safetensors

ROOT = Path(__file__).resolve().parents[1]
COPY = """
import os, shutil, sys
from pathlib import Path
out = Path(sys.argv[2]); out.mkdir()
for path in Path(sys.argv[1]).iterdir():
    shutil.copyfile(path, out / path.name)
    handle = os.open(out / path.name, os.O_RDONLY); os.fsync(handle); os.close(handle)
"""
LOAD = "import sys, jax, phi3_jax; model = phi3_jax.load(sys.argv[1]); jax.block_until_ready(model.params)"


def make(folder: Path, member: str, layers: int | None) -> None:
    """A folder with random weights in the published layout."""
    cfg = published(member)
    cfg = dataclasses.replace(cfg, layers=layers or cfg.layers)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config.to_config(cfg, "bfloat16")))
    specs = huggingface.leaves_of(cfg)
    dtypes = dict.fromkeys(specs, np.dtype(ml_dtypes.bfloat16))
    random = np.random.default_rng(0)
    pool = (random.standard_normal(1 << 20) * 0.02).astype(ml_dtypes.bfloat16)

    def read(leaf: str, layer: int | None) -> np.ndarray:
        shape = specs[leaf].shape if layer is None else specs[leaf].shape[1:]
        return np.resize(np.roll(pool, random.integers(1 << 20)), shape)

    huggingface.write_params(folder, cfg, dtypes, read)


def timed(*command: str) -> tuple[float, float]:
    """(seconds, peak resident bytes) of a command in a process of its own."""
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed")
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def main(flags: Mapping[str, Any]) -> None:
    if flags["make"]:
        return make(Path(flags["make"]), flags["member"], flags["layers"])
    work = Path(tempfile.mkdtemp(dir=flags["folder"]))
    try:
        layers = ["--layers", str(flags["layers"])] if flags["layers"] else []
        # In a process of its own: a child's peak of memory starts at that of the process it was forked from.
        timed("benchmarks/convert.py", "--make", str(work / "source"), "--member", flags["member"], *layers)
        size = sum(math.prod(e.shape) * 2 for e in safetensors.find(work / "source").values())
        print(f"phi-3-{flags['member']}, {size / 1e9:.2f} GB of bfloat16 parameters\n")
        print("| what | seconds | beside the copy | peak memory / parameters |\n| --- | --- | --- | --- |", flush=True)
        convert, source, run, back = "launch/convert.py", *(str(work / n) for n in ("source", "run", "back"))
        steps = (
            ("plain copy, synced", ("-c", COPY, source, str(work / "copy"))),
            ("import", (convert, "--from", f"hf:{source}", "--to", run)),
            ("export", (convert, "--from", run, "--to", f"hf:{back}")),
            ('load("hf:..")', ("-c", LOAD, f"hf:{source}")),
            ("load(run)", ("-c", LOAD, run)),
        )
        copy = None
        for name, command in steps:
            seconds, peak = timed(*command)
            copy = copy or seconds
            print(f"| {name} | {seconds:.1f} | {seconds / copy:.2f} | {peak / size:.2f} |", flush=True)
            shutil.rmtree(work / "copy", ignore_errors=True)
        names = sorted(p.name for p in Path(source).iterdir())
        _, different, failed = filecmp.cmpfiles(source, back, names, shallow=False)
        print(
            f"\nround trip of {len(names)} files: {'bitwise equal' if not different + failed else different + failed}"
        )
    finally:
        shutil.rmtree(work, ignore_errors=True)


COMMAND = Command(
    "benchmarks/convert.py",
    __doc__,
    main,
    {
        "member": Flag(keys.word("whose shape", "mini", "mini", "small", "medium")),
        "layers": Flag(keys.whole("fewer layers than published, for a quick look", None, 1)),
        "make": Flag(keys.local("only makes the folder with random weights, and leaves it"), "DIR"),
        "folder": Flag(keys.local("where to work; without, a temporary folder"), "DIR"),
    },
    alone=True,
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
