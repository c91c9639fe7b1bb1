"""Long context by size: proxies that are made ready for it. `name:words` after `--config`, for example

    python launch/run.py --config experiments/longcontext.py:base        # minutes, offline

`base` trains a proxy of a short window that can be extended and asked: windows of 128 bytes, each inside one document,
half of them with needles, `#ab=48213;` stated and later repeated (`phi3_jax.data.needles`). Text and the values of
repetitions are two domains of the loss, and their means weigh the same. A pico proxy finds the needles within 1,000 of the
2,500 steps; a nano proxy of twice the width had not after 1,000.

Words:
    size=mini|small|medium    default mini
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

TARGETS = ("base",)
WORDS = {"size": TRIO, "data": str, "steps": int, "seed": int, "seeds": int, "name": str}
WINDOW, ROWS, STEPS = 128, 16, 2500


def get_config(argument: str = "") -> ConfigDict:
    """The study as a ConfigDict; `argument` is what follows the colon on the command line."""
    target, words = parse_arguments(argument, TARGETS, WORDS)
    steps = words.pop("steps", STEPS)
    if steps < 1:
        raise UserError("steps=0 trains nothing; use 1 or more")
    words["data"] = f"needles:{words.get('data', 'pydocs')}"
    config = base_config()
    config.update(name=f"longcontext-{target}", sizes=(words.pop("size", "mini"),), scale="pico", ladder="clean")
    config.budgets = (steps * ROWS * WINDOW,)
    config.data.update(window=WINDOW, held_out=0.06)  # as launch/extend.py splits documents
    config.train.update(batch_tokens=ROWS * WINDOW, log_every=100, eval_points=5)
    return apply(config, words, {"data": "data.source"})
