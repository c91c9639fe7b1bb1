"""Long context by size: proxies that are made ready for it. `name:words` after `--config`, for example

    python launch/run.py --config experiments/longcontext.py:base        # minutes, offline
    python launch/run.py --config experiments/longcontext.py:sizes       # bases of three sizes, three seeds: the study
    phi3-jax sizes runs/longcontext                                      # what of the study ran, and what its rule says

`base` trains a proxy of a short window that can be extended and asked: windows of 128 bytes, each inside one document,
half of them with needles, `#ab=48213;` stated and later repeated (`phi3_jax.data.needles`). Text and the values of
repetitions are two domains of the loss, and their means weigh the same. A pico proxy finds the needles within 1,000 of the
2,500 steps; a nano proxy of twice the width had not after 1,000.

`sizes` trains the bases of the size study. Why does medium-128k fall to 46.1 on RULER at 128k where mini keeps 66.7,
while it leads by 1.1 at 4k? A pilot with one seed found that the larger pico proxy extrapolates worse until it is
trained long. The study extends each base eightfold with five lists (none, PI, NTK, YaRN, searched), with and without
100 steps of training; its rule and its cells stand in `phi3_jax/extension/sizes.py`, written before any of them ran,
and `phi3-jax sizes` names what is not run.

Words:
    size=mini|small|medium    of base; default mini
    data=<text>               a file or folder of text, or pydocs (the default): the documentation of this Python
    steps=2500                of 16 windows
    seed=0  seeds=1           first seed, number of seeds
    name=<name>               the study is runs/<name>; default longcontext-base
"""

from __future__ import annotations

from ml_collections import ConfigDict

from phi3_jax.errors import UserError
from phi3_jax.experiment import apply, base_config, parse_arguments
from phi3_jax.family import TRIO

TARGETS = ("base", "sizes")
WORDS = {"size": TRIO, "data": str, "steps": int, "seed": int, "seeds": int, "name": str}
WINDOW, ROWS, STEPS, SEEDS = 128, 16, 2500, 3


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    steps = words.pop("steps", STEPS)
    if steps < 1:
        raise UserError("steps=0 trains nothing; use 1 or more")
    words["data"] = f"needles:{words.get('data', 'pydocs')}"
    config = base_config()
    size = words.pop("size", None)
    if target == "sizes" and size:
        raise UserError(f"size={size} is a word of base; sizes trains all three")
    config.update(name=f"longcontext-{target}", scale="pico", ladder="clean")
    config.update(dict(sizes=(size or "mini",)) if target == "base" else dict(sizes=TRIO, seeds=SEEDS))
    config.budgets = (steps * ROWS * WINDOW,)
    config.data.update(window=WINDOW, held_out=0.06)  # as launch/extend.py splits documents
    config.train.update(batch_tokens=ROWS * WINDOW, log_every=100, eval_points=5)
    return apply(config, words, {"data": "data.source"})
