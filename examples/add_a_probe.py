"""A probe: one more number that every evaluation of a run gives.

    phi3-jax run --config examples/add_a_probe.py --workdir runs/example-probe      # half a minute on two cores

A meter turns the losses and hits of an evaluation into rows. An experiment file may change the table of meters, and every
process of its study reads the file. The rows stand in the run's evals.jsonl, in runs.csv, and unasked in the report.
For all studies, a meter is a file in phi3_jax/data/meters/ and a line in the table there.
"""

import numpy as np
from ml_collections import ConfigDict

from phi3_jax.data.meters import METERS, Evaluation, Meter, Row, row
from phi3_jax.experiment import base_config
from phi3_jax.statistics import proportion

TEXT = METERS["text"]  # what it gives: loss in nats per token, and bits per byte


def accuracy(e: Evaluation) -> list[Row]:
    """How often the next token is the likeliest one.

    `e.nll` and `e.hit` are (windows, tokens): the loss of each target, and whether it was the likeliest token. They count
    where `e.domains` is above 0. Tokens of one window are no independent draws, so the interval is over windows.
    """
    counts = e.domains > 0
    window = np.broadcast_to(np.arange(len(counts))[:, None], counts.shape)
    share = proportion(e.hit[counts], window[counts])  # with a 95 % interval
    return [row("text", e.name, "accuracy", share, chance=1 / e.vocab)]


METERS["text"] = Meter(lambda e: [*TEXT.measure(e), *accuracy(e)], named=True)


def get_config(argument: str = "") -> ConfigDict:
    """A proxy of phi-3-mini on the documentation that Python brings along, evaluated at two budgets."""
    config = base_config()
    config.update(sizes=("mini",), scale="pico", budgets=(50_000, 100_000))
    config.data.source = "pydocs"
    return config
