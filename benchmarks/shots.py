"""Scores of one few-shot task, with the exemplars in every row and with the exemplars read once.

    python benchmarks/shots.py [--scale milli] [--shots 300,700] [--rows 64]

Random tokens and weights of a proxy of mini with mini's vocabulary; questions with their options have 40 to 130 tokens, as
HellaSwag's, behind so many tokens of exemplars. One core; both ways in one process, CPU seconds: `cold` with compilation,
`warm` without. `others` is the part of a core that other processes took meanwhile.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phi3_jax import commands, keys
from phi3_jax.commands import Command, Flag

sys.path.insert(0, str(Path(__file__).parent))
from train_step import busy

from phi3_jax.family import SCALES


def main(flags: Mapping[str, Any]) -> None:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import jax
    import jax.numpy as jnp

    from phi3_jax import proxy
    from phi3_jax.inference.engine import Engine
    from phi3_jax.interop.loading import Model
    from phi3_jax.models.spec import init_params

    cfg = proxy("mini", flags["scale"], "clean", vocab=32064, context=4096)
    params = init_params(cfg, 0)
    params["unembedding"] = 0.1 * jax.random.normal(jax.random.key(1), params["unembedding"].shape)
    model, rng = Model(params, cfg, None, jnp.float32, stop_ids=()), np.random.default_rng(0)
    draw = lambda n: rng.integers(0, cfg.vocab, n).tolist()  # noqa: E731
    print(f"{cfg.name} {cfg.matrix_params:,} parameters in layers, {flags['rows']} rows")
    for length in flags["shots"]:
        exemplars = draw(length)
        sizes = zip(rng.integers(30, 100, flags["rows"]), rng.integers(10, 30, flags["rows"]), strict=True)
        pairs = [(exemplars + draw(int(a)), draw(int(b))) for a, b in sizes]
        seen = []
        for shared in (0, length):
            engine = Engine(model, batch=8)
            for state in ("cold", "warm"):
                engine._kept_before = {}
                start, spent, machine = time.perf_counter(), time.process_time(), busy()
                scores = engine.score(pairs, shared)
                own = time.process_time() - spent
                others = (busy() - machine - own) / (time.perf_counter() - start)
                way = "read once" if shared else "every row"
                print(f"{length} {way} {state}: {own:.2f} CPU s, others {others:.1f}", flush=True)
                seen.append(own)
            print(f"  programs {engine.compilations}")
            seen.append([s.logprob for s in scores])
        apart = np.abs(np.subtract(seen[2], seen[5])).max()
        print(
            f"  cold x{seen[0] / seen[3]:.2f}, warm x{seen[1] / seen[4]:.2f}, largest difference {apart:.1e} nats",
            flush=True,
        )


COMMAND = Command(
    "benchmarks/shots.py",
    __doc__,
    main,
    {
        "scale": Flag(keys.word("of the proxy of mini", "milli", *SCALES)),
        "shots": Flag(keys.Key("tokens of the exemplars", (300, 700), tuple, 1, item=keys.whole("tokens", None, 1))),
        "rows": Flag(keys.whole("questions with an option", 64, 1)),
    },
)

if __name__ == "__main__":
    sys.exit(commands.start(COMMAND, sys.argv[1:]))
