"""A strategy of your own: how parameters and activations are split over devices.

    XLA_FLAGS=--xla_force_host_platform_device_count=4 phi3-jax run --config examples/new_strategy.py --workdir runs/four
    phi3-jax run --config examples/new_strategy.py:dp --workdir runs/one

The first makes four devices of one CPU, the second takes one device; both give the same losses, to rounding.

A strategy maps the logical axes of tensors to the axes of a mesh: `embed`, `kv_heads`, `mlp`, `vocab` of parameters,
`batch` and `time` of activations; to `replica`, `data`, `context` or `tensor`. An experiment file may add one to the table,
and every process of its study reads the file. For all studies, a strategy is a row in phi3_jax/strategies.py.
"""

from ml_collections import ConfigDict

from phi3_jax.experiment import base_config
from phi3_jax.strategies import STRATEGIES, strategy

# As "fsdp_cp", but the devices that share a sequence hold copies of the parameters: more memory, and shorter messages.
STRATEGIES["copies_cp"] = strategy(embed=("data",), time=("context",))


def get_config(argument: str = "") -> ConfigDict:
    """A proxy of phi-3-small, under this strategy, or the one that `argument` names."""
    config = base_config()
    config.update(sizes=("small",), scale="pico", budgets=(50_000,))
    if argument:
        config.train.strategy = argument
    else:
        # Of four devices two share a sequence; the others take the other rows of the batch.
        config.train.update(strategy="copies_cp", context=2)
    return config
